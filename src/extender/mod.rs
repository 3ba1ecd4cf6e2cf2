//! The kube-scheduler extender: filter, prioritize, bind.
