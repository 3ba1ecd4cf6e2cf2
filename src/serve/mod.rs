//! What every process needs to be one: TLS, health, metrics, shutdown, Lease.

pub mod ca_bundle;
pub mod certificates;
pub mod forward;
pub mod health;
pub mod https;
pub mod lease;
pub mod pki;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
