//! Calls to the API server, each with a time limit, and their failures by what to do next.

use std::time::Duration;

/// Longest wait for one answer.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Why a write did not come about.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The object has changed since it was read: look again.
    #[error("the object changed meanwhile")]
    Conflict,
    /// There is no such object (any more).
    #[error("the object is gone")]
    Gone,
    /// No answer in time; the write may have happened.
    #[error("the API server did not answer within {} s", LIMIT.as_secs())]
    Timeout,
    /// Everything else.
    #[error(transparent)]
    Api(kube::Error),
}

impl From<kube::Error> for CallError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 => Self::Conflict,
            kube::Error::Api(status) if status.code == 404 => Self::Gone,
            _ => Self::Api(error),
        }
    }
}

/// Waits for a call, at most [`LIMIT`].
///
/// # Errors
/// What the call answered, or [`CallError::Timeout`].
pub async fn limited<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, CallError> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(CallError::Timeout),
    }
}
