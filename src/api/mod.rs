//! What people write: custom resources, annotations, quantities; their
//! parsing and validation. Nothing here decides or does IO.

pub mod annotations;
pub mod duration;
pub mod gpu_node;
pub mod gpu_request;
pub mod names;
pub mod node_policy;
pub mod scale_policy;
pub mod settings;
pub mod units;
pub mod workload;

use kube::CustomResourceExt;

/// All CustomResourceDefinitions as one YAML stream, in the form that `manifests/crds.yaml` holds.
#[must_use]
pub fn crds_yaml() -> String {
    [
        scale_policy::ScalePolicy::crd(),
        node_policy::NodePolicy::crd(),
        gpu_node::GpuNode::crd(),
    ]
    .iter()
    .map(|crd| {
        let yaml = serde_yaml_ng::to_string(crd).expect("a CRD made from Rust types is always YAML");
        format!("---\n{yaml}")
    })
    .collect()
}
