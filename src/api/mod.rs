//! What people write: custom resources, annotations, quantities; their
//! parsing and validation. Nothing here decides or does IO.

pub mod annotations;
pub mod duration;
pub mod gpu_node;
pub mod gpu_request;
pub mod host;
pub mod names;
pub mod node_policy;
pub mod packing;
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
        let mut crd = serde_json::to_value(crd).expect("a CRD made from Rust types is always JSON");
        drop_foreign_formats(&mut crd);
        let yaml = serde_yaml_ng::to_string(&crd).expect("what is JSON is always YAML");
        format!("---\n{yaml}")
    })
    .collect()
}

/// Kubernetes knows no unsigned formats, and says so in a warning at every apply; the bounds are in `minimum`.
fn drop_foreign_formats(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            if map
                .get("format")
                .and_then(serde_json::Value::as_str)
                .is_some_and(|format| format.starts_with("uint"))
            {
                map.remove("format");
            }
            map.values_mut().for_each(drop_foreign_formats);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(drop_foreign_formats),
        _ => {}
    }
}
