//! How a pod's place is chosen among those where it fits.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a pod's node and GPUs are chosen among those where it fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// The place that leaves the free GPU memory most usable for what the cluster is really asked for.
    #[default]
    Fragmentation,
    /// The place that leaves the least beside it, on nodes in use before empty ones.
    BestFit,
    /// The emptiest node and the emptiest GPUs, so that replicas keep out of each other's way. Keeps nodes busy.
    Spread,
}

/// A text that names no way to place pods.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write fragmentation, best-fit or spread")]
pub struct PackingError;

impl FromStr for Packing {
    type Err = PackingError;

    fn from_str(text: &str) -> Result<Packing, PackingError> {
        [Packing::Fragmentation, Packing::BestFit, Packing::Spread]
            .into_iter()
            .find(|packing| packing.name() == text)
            .ok_or(PackingError)
    }
}

impl Packing {
    const fn name(self) -> &'static str {
        match self {
            Packing::Fragmentation => "fragmentation",
            Packing::BestFit => "best-fit",
            Packing::Spread => "spread",
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
