//! Services: one key more in the selector of those that go through the gates, which no pod carries.

use std::collections::BTreeMap;

use super::patch::{Operation, set_texts};
use super::{Request, Requester, Verdict, annotation, ownership};
use crate::api::{annotations as key, names};
use crate::plan::gating::Gating;

const SELECTOR: &str = "/spec/selector";

/// Decides for a Service, given whether it goes through the gates.
#[must_use]
pub fn service(request: Request<'_>, gating: &Gating) -> Verdict {
    if request.is_going() {
        return Verdict::allow();
    }
    let (gated, warnings) = match gating {
        Gating::Gate(_) => (Some("true".to_owned()), Vec::new()),
        Gating::Leave | Gating::Off => (None, Vec::new()),
        Gating::Cannot(reason) if request.requester == Requester::Person => (
            None,
            vec![format!("Ebb cannot wake a model by this Service: {reason}")],
        ),
        Gating::Cannot(_) => (None, Vec::new()),
    };
    let mut patch = Vec::new();
    // A Service without a selector is left without one.
    if request
        .object
        .pointer(SELECTOR)
        .is_some_and(serde_json::Value::is_object)
    {
        patch = set_texts(
            request.object,
            SELECTOR,
            &BTreeMap::from([(names::GATED_KEY, gated)]),
        );
    }
    if matches!(gating, Gating::Gate(_)) {
        patch.extend(gate_ports(request));
        patch.extend(ownership::disown(request.object, request.old, "selector"));
    }
    Verdict {
        refusal: None,
        patch,
        warnings,
    }
}

/// The gate ports are the controller's: a replace that lost them, or a copy that brought those of another Service, gets
/// what is stored.
fn gate_ports(request: Request<'_>) -> Vec<Operation> {
    if request.requester == Requester::Ebb {
        return Vec::new();
    }
    let stored = request.old.and_then(|old| annotation(old, key::GATE_PORTS));
    set_texts(
        request.object,
        "/metadata/annotations",
        &BTreeMap::from([(key::GATE_PORTS, stored.map(str::to_owned))]),
    )
}
