//! Answers that the gate gives itself, as `application/problem+json` (RFC 9457).

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;

use super::metrics::Outcome;
use crate::api::workload::WorkloadRef;

/// Why a request got no answer from its workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How the request ends in the metrics; also says the status.
    pub outcome: Outcome,
    /// What happened, for the person who reads the answer.
    pub detail: String,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl Problem {
    /// A problem without advice on when to try again.
    pub fn new(outcome: Outcome, detail: impl Into<String>) -> Self {
        Self {
            outcome,
            detail: detail.into(),
            retry_after: None,
        }
    }

    fn shape(&self) -> (StatusCode, &'static str, &'static str) {
        match self.outcome {
            Outcome::QueueFull => (
                StatusCode::SERVICE_UNAVAILABLE,
                "queue-full",
                "Too many requests wait for this model",
            ),
            Outcome::TimedOut => (
                StatusCode::GATEWAY_TIMEOUT,
                "max-wait",
                "The model did not become ready in time",
            ),
            Outcome::WakeFailed => (
                StatusCode::SERVICE_UNAVAILABLE,
                "wake-failed",
                "The model cannot be started",
            ),
            Outcome::BadRequest => (
                StatusCode::BAD_REQUEST,
                "bad-request",
                "The request cannot be read",
            ),
            Outcome::Refused => (
                StatusCode::NOT_IMPLEMENTED,
                "refused",
                "The gate does not forward this",
            ),
            Outcome::NoRoute => (
                StatusCode::SERVICE_UNAVAILABLE,
                "no-workload",
                "No model stands behind this address",
            ),
            Outcome::Answered | Outcome::HealthCheck | Outcome::ClientLeft | Outcome::UpstreamFailed => (
                StatusCode::BAD_GATEWAY,
                "upstream-failed",
                "The model closed the connection without an answer",
            ),
        }
    }

    /// The answer.
    #[must_use]
    pub fn response(&self, workload: Option<&WorkloadRef>) -> Response<Full<Bytes>> {
        let (status, kind, title) = self.shape();
        let mut body = serde_json::json!({
            "type": format!("https://ebb.dev/problems/{kind}"),
            "title": title,
            "status": status.as_u16(),
            "detail": self.detail,
        });
        if let Some(workload) = workload {
            body["workload"] = workload.to_string().into();
        }
        let mut response = Response::new(Full::from(body.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.retry_after {
            // Rounded up: 0 would mean at once.
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs() + 1));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn says_what_why_and_when_to_try_again() {
        let problem = Problem {
            retry_after: Some(Duration::from_millis(4_200)),
            ..Problem::new(Outcome::QueueFull, "3 wait \"already\"")
        };
        let response = problem.response(None);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "5");
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["detail"], "3 wait \"already\"");
        assert_eq!(body["status"], 503);
    }
}
