//! What every process needs to be one: TLS, health, metrics, shutdown, Lease.

pub mod health;
pub mod shutdown;
pub mod telemetry;
