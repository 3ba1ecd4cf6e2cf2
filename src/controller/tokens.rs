//! Who dials the link: ServiceAccount tokens checked by TokenReview, the answers kept for a minute.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::api::names;
use crate::cluster::call::{CallError, limited};

/// So long an answer is believed.
const BELIEVED: Duration = Duration::from_secs(60);
/// Answers kept; those of wrong tokens too, so that a dialler without a right to does not load the API server.
const KEPT: usize = 1024;
/// Where a bound token says which pod it was made for.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";

/// A caller that may use the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The pod its token is bound to, where it is bound to one.
    pub pod: Option<String>,
}

/// Why a caller may not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No `Authorization: Bearer …`.
    #[error(
        "no bearer token: mount a ServiceAccount token with audience {} and send it",
        names::LINK_AUDIENCE
    )]
    Missing,
    /// The API server does not accept the token for our audience.
    #[error("the token is not accepted: {0}")]
    Invalid(String),
    /// It is somebody else's.
    #[error("{0} may not use the link: only the gates' ServiceAccount may")]
    WrongUser(String),
    /// The API server gave no answer.
    #[error("cannot check the token now: {0}")]
    Unknown(String),
}

/// Checks tokens.
pub struct Tokens {
    client: Client,
    user: String,
    known: Mutex<HashMap<Vec<u8>, Answer>>,
}

/// What was answered, and until when it is believed.
type Answer = (Instant, Result<Caller, Refused>);

impl Tokens {
    /// For gates that run in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            user: format!("system:serviceaccount:{namespace}:{}", names::GATE),
            known: Mutex::default(),
        }
    }

    /// Checks one token.
    ///
    /// # Errors
    /// Why its bearer may not use the link.
    pub async fn check(&self, token: &str) -> Result<Caller, Refused> {
        let key = digest(token);
        let now = Instant::now();
        if let Some((until, answer)) = self.known.lock().get(&key)
            && *until > now
        {
            return answer.clone();
        }
        let answer = match self.review(token).await {
            Ok(review) => self.judge(review),
            // Not kept: the next attempt may get an answer.
            Err(error) => return Err(Refused::Unknown(error.to_string())),
        };
        let mut known = self.known.lock();
        known.retain(|_, (until, _)| *until > now);
        if known.len() < KEPT {
            known.insert(key, (now + BELIEVED, answer.clone()));
        }
        answer
    }

    async fn review(&self, token: &str) -> Result<TokenReview, CallError> {
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                audiences: Some(vec![names::LINK_AUDIENCE.to_owned()]),
                token: Some(token.to_owned()),
            },
            status: None,
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        limited(api.create(&PostParams::default(), &review)).await
    }

    fn judge(&self, review: TokenReview) -> Result<Caller, Refused> {
        let status = review.status.unwrap_or_default();
        let audience = status
            .audiences
            .iter()
            .flatten()
            .any(|audience| audience == names::LINK_AUDIENCE);
        if status.authenticated != Some(true) || !audience {
            let error = status
                .error
                .unwrap_or_else(|| format!("it is not for audience {}", names::LINK_AUDIENCE));
            return Err(Refused::Invalid(error));
        }
        let user = status.user.unwrap_or_default();
        let username = user.username.unwrap_or_default();
        if username != self.user {
            return Err(Refused::WrongUser(username));
        }
        let pod = user
            .extra
            .as_ref()
            .and_then(|extra| extra.get(POD_NAME)?.first().cloned());
        Ok(Caller { pod })
    }
}

/// SHA-256 of the token, so that no token is kept in memory. By way of rustls, which has it in its provider.
fn digest(token: &str) -> Vec<u8> {
    match rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256 {
        rustls::SupportedCipherSuite::Tls13(suite) => suite
            .common
            .hash_provider
            .hash(token.as_bytes())
            .as_ref()
            .to_vec(),
        rustls::SupportedCipherSuite::Tls12(suite) => suite
            .common
            .hash_provider
            .hash(token.as_bytes())
            .as_ref()
            .to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_kept_as_digests() {
        assert_eq!(digest("a").len(), 32);
        assert_ne!(digest("a"), digest("b"));
    }
}
