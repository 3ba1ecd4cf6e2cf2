//! What a pod asks of GPUs, read from its containers' limits and its annotations.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use k8s_openapi::api::core::v1::{Container, PodSpec};

use super::units::{Bytes, QuantityError};
use super::{annotations, names};

/// Whether a pod shares its GPUs with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Several pods on one GPU, each with its bytes.
    Shared,
    /// Whole cards.
    Exclusive,
}

/// What a pod asks: this much on each of that many GPUs of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GpuRequest {
    /// Number of GPUs.
    pub gpus: NonZeroU32,
    /// Bytes on each of them.
    pub bytes_per_gpu: Bytes,
    /// Shared or whole cards.
    pub sharing: Sharing,
}

/// Why a pod's request cannot be served as written. The texts are shown by `kubectl apply`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuRequestError {
    /// The resource stands in more than one container.
    #[error(
        "containers `{0}` and `{1}` both ask for ebb.dev/gpu-memory: only one container of a pod can; put the total on one of them"
    )]
    TwoContainers(String, String),
    /// The resource stands in an init container.
    #[error("init container `{0}` asks for ebb.dev/gpu-memory: only a main container can")]
    InitContainer(String),
    /// The quantity cannot be read.
    #[error("container `{container}`: ebb.dev/gpu-memory: {error}")]
    Quantity {
        /// The container's name.
        container: String,
        /// What is wrong with it.
        error: QuantityError,
    },
    /// Zero bytes.
    #[error(
        "container `{0}` asks for 0 bytes of ebb.dev/gpu-memory: ask for what the model needs, as 18Gi, or leave the resource out"
    )]
    Zero(String),
    /// `ebb.dev/gpus` is no count.
    #[error("annotation ebb.dev/gpus is `{0}`: write a number from 1 to 64")]
    Gpus(String),
    /// `ebb.dev/sharing` is neither of its two values.
    #[error("annotation ebb.dev/sharing is `{0}`: write shared or exclusive")]
    Sharing(String),
}

/// Reads the pod's request; `None` when it asks for no GPU memory.
///
/// # Errors
/// When the request cannot be served as written.
pub fn gpu_request(
    spec: &PodSpec,
    pod_annotations: Option<&BTreeMap<String, String>>,
) -> Result<Option<GpuRequest>, GpuRequestError> {
    if let Some(init) = spec
        .init_containers
        .iter()
        .flatten()
        .find(|c| quantity(c).is_some())
    {
        return Err(GpuRequestError::InitContainer(init.name.clone()));
    }
    let mut asking = spec.containers.iter().filter_map(|c| quantity(c).map(|q| (c, q)));
    let Some((container, text)) = asking.next() else {
        return Ok(None);
    };
    if let Some((second, _)) = asking.next() {
        return Err(GpuRequestError::TwoContainers(
            container.name.clone(),
            second.name.clone(),
        ));
    }
    let total: Bytes = text.parse().map_err(|error| GpuRequestError::Quantity {
        container: container.name.clone(),
        error,
    })?;
    let annotation = |key: &str| pod_annotations.and_then(|a| a.get(key));
    let gpus = match annotation(annotations::GPUS) {
        None => NonZeroU32::MIN,
        Some(text) => text
            .parse::<NonZeroU32>()
            .ok()
            .filter(|n| n.get() <= 64)
            .ok_or_else(|| GpuRequestError::Gpus(text.clone()))?,
    };
    let sharing = match annotation(annotations::SHARING).map(String::as_str) {
        None | Some("shared") => Sharing::Shared,
        Some("exclusive") => Sharing::Exclusive,
        Some(other) => return Err(GpuRequestError::Sharing(other.to_owned())),
    };
    // Rounded up: a split that lost the remainder would promise less than was declared.
    let bytes_per_gpu = Bytes(total.0.div_ceil(u64::from(gpus.get())));
    if bytes_per_gpu.0 == 0 {
        return Err(GpuRequestError::Zero(container.name.clone()));
    }
    Ok(Some(GpuRequest {
        gpus,
        bytes_per_gpu,
        sharing,
    }))
}

/// Index of the container that asks for GPU memory, if any.
#[must_use]
pub fn gpu_container(spec: &PodSpec) -> Option<usize> {
    spec.containers.iter().position(|c| quantity(c).is_some())
}

fn quantity(container: &Container) -> Option<&str> {
    let resources = container.resources.as_ref()?;
    [&resources.limits, &resources.requests]
        .into_iter()
        .flatten()
        .find_map(|list| list.get(names::GPU_MEMORY))
        .map(|quantity| quantity.0.as_str())
}
