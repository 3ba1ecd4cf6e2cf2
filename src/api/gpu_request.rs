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

/// The parts of a pod that say what it asks, whatever type they were read into: a whole `PodSpec`, or the few fields
/// that the scheduler extender takes out of a request.
pub trait Asking {
    /// Name and quantity of the init containers that carry the resource.
    fn init_containers(&self) -> impl Iterator<Item = (&str, &str)>;
    /// Name and quantity of the main containers that carry the resource.
    fn containers(&self) -> impl Iterator<Item = (&str, &str)>;
    /// Value of [`annotations::GPUS`].
    fn gpus(&self) -> Option<&str>;
    /// Value of [`annotations::SHARING`].
    fn sharing(&self) -> Option<&str>;
}

/// A pod's (or a pod template's) spec with its annotations.
struct SpecAndAnnotations<'a>(&'a PodSpec, Option<&'a BTreeMap<String, String>>);

impl SpecAndAnnotations<'_> {
    fn annotation(&self, key: &str) -> Option<&str> {
        self.1.and_then(|a| a.get(key)).map(String::as_str)
    }
}

fn carrying(container: &Container) -> Option<(&str, &str)> {
    quantity(container).map(|quantity| (container.name.as_str(), quantity))
}

impl Asking for SpecAndAnnotations<'_> {
    fn init_containers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.init_containers.iter().flatten().filter_map(carrying)
    }

    fn containers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.containers.iter().filter_map(carrying)
    }

    fn gpus(&self) -> Option<&str> {
        self.annotation(annotations::GPUS)
    }

    fn sharing(&self) -> Option<&str> {
        self.annotation(annotations::SHARING)
    }
}

/// Reads the pod's request; `None` when it asks for no GPU memory.
///
/// # Errors
/// When the request cannot be served as written.
pub fn gpu_request(
    spec: &PodSpec,
    pod_annotations: Option<&BTreeMap<String, String>>,
) -> Result<Option<GpuRequest>, GpuRequestError> {
    request_of(&SpecAndAnnotations(spec, pod_annotations))
}

/// Reads a request out of its parts; `None` when there is none.
///
/// # Errors
/// When the request cannot be served as written.
pub fn request_of(pod: &impl Asking) -> Result<Option<GpuRequest>, GpuRequestError> {
    if let Some((name, _)) = pod.init_containers().next() {
        return Err(GpuRequestError::InitContainer(name.to_owned()));
    }
    let mut asking = pod.containers();
    let Some((name, text)) = asking.next() else {
        return Ok(None);
    };
    if let Some((second, _)) = asking.next() {
        return Err(GpuRequestError::TwoContainers(name.to_owned(), second.to_owned()));
    }
    let total: Bytes = text.parse().map_err(|error| GpuRequestError::Quantity {
        container: name.to_owned(),
        error,
    })?;
    let gpus = match pod.gpus() {
        None => NonZeroU32::MIN,
        Some(text) => text
            .parse::<NonZeroU32>()
            .ok()
            .filter(|n| n.get() <= 64)
            .ok_or_else(|| GpuRequestError::Gpus(text.to_owned()))?,
    };
    let sharing = match pod.sharing() {
        None | Some("shared") => Sharing::Shared,
        Some("exclusive") => Sharing::Exclusive,
        Some(other) => return Err(GpuRequestError::Sharing(other.to_owned())),
    };
    // Rounded up: a split that lost the remainder would promise less than was declared.
    let bytes_per_gpu = Bytes(total.0.div_ceil(u64::from(gpus.get())));
    if bytes_per_gpu.0 == 0 {
        return Err(GpuRequestError::Zero(name.to_owned()));
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
