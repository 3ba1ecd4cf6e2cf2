//! The file that stands for the GPUs of one node: devices, memory, processes.
