//! Admission: what is written on workloads, pods and Services, and what is refused.
