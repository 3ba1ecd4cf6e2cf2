//! `admission.k8s.io/v1` AdmissionReview, only the parts that are read or written.

use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plan::admission::Verdict;

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";

/// What the API server sends.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Review {
    api_version: String,
    kind: String,
    request: Option<ReviewRequest>,
}

/// The request inside.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReviewRequest {
    uid: String,
    #[serde(default)]
    pub kind: GroupVersionKind,
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    pub user_info: UserInfo,
    /// Absent at deletions.
    #[serde(default)]
    pub object: Option<Value>,
    /// Absent at creations.
    #[serde(default)]
    pub old_object: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct GroupVersionKind {
    pub kind: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct UserInfo {
    pub username: String,
}

impl Review {
    /// Reads the body of a request.
    pub(super) fn read(body: &[u8]) -> Result<ReviewRequest, String> {
        let review: Review = serde_json::from_slice(body)
            .map_err(|error| format!("cannot read the AdmissionReview: {error}"))?;
        if review.api_version != API_VERSION || review.kind != KIND {
            return Err(format!(
                "this is {} {}, not {API_VERSION} {KIND}",
                review.api_version, review.kind
            ));
        }
        review
            .request
            .ok_or_else(|| "the AdmissionReview has no request".to_owned())
    }
}

impl ReviewRequest {
    /// The object's name, or the beginning of it when the API server will make one.
    pub(super) fn name(&self) -> &str {
        if !self.name.is_empty() {
            return &self.name;
        }
        let metadata = self.object.as_ref().and_then(|object| object.get("metadata"));
        metadata
            .and_then(|metadata| metadata.get("generateName"))
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

/// What goes back.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: AnswerResponse,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AnswerResponse {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    /// Base64 text of the JSON patch.
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Status {
    message: String,
    code: u16,
}

impl Answer {
    /// Carries a verdict out.
    pub(super) fn new(request: &ReviewRequest, verdict: Verdict) -> Self {
        let allowed = verdict.refusal.is_none();
        let patch = (allowed && !verdict.patch.is_empty())
            // Operations are made of JSON values, which are always JSON.
            .then(|| serde_json::to_vec(&verdict.patch).ok())
            .flatten()
            .map(|patch| base64::engine::general_purpose::STANDARD.encode(patch));
        Self {
            api_version: API_VERSION,
            kind: KIND,
            response: AnswerResponse {
                uid: request.uid.clone(),
                allowed,
                status: verdict.refusal.map(|message| Status { message, code: 403 }),
                patch_type: patch.is_some().then_some("JSONPatch"),
                patch,
                warnings: verdict.warnings,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::admission::Operation;
    use serde_json::json;

    #[test]
    fn a_patch_is_base64_text() {
        let body = json!({"apiVersion": API_VERSION, "kind": KIND, "request": {"uid": "u"}});
        let request = Review::read(body.to_string().as_bytes()).unwrap();
        let verdict = Verdict {
            patch: vec![Operation::add("/spec/replicas", 0)],
            ..Verdict::default()
        };
        let answer = serde_json::to_value(Answer::new(&request, verdict)).unwrap();
        let patch = answer["response"]["patch"].as_str().unwrap();
        let bytes = base64::engine::general_purpose::STANDARD.decode(patch).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&bytes).unwrap(),
            json!([{"op": "add", "path": "/spec/replicas", "value": 0}])
        );
        assert_eq!(answer["response"]["patchType"], "JSONPatch");
    }

    #[test]
    fn adversarial_other_documents_are_refused() {
        for body in ["", "{}", "[]", r#"{"apiVersion":"v1","kind":"Pod"}"#] {
            assert!(Review::read(body.as_bytes()).is_err(), "{body}");
        }
    }
}
