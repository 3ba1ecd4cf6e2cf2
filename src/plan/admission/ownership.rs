//! Fields that Ebb moves belong to nobody in `managedFields`: whoever else were named there would get a conflict, or
//! give one to the next person, at a server-side apply of an unchanged manifest.

use serde_json::{Map, Value};

use super::patch::Operation;

/// Takes `spec.<field>` out of every entry of the object's `managedFields`. Entries that then read as in `old` get back
/// their old time, so that an apply without a change stays one.
///
/// The entries of the scale subresource are treated like the others: an unforced apply with another count conflicts
/// with those too.
#[must_use]
pub fn disown(object: &Value, old: Option<&Value>, field: &str) -> Option<Operation> {
    let entries = entries(object)?;
    let key = format!("f:{field}");
    if !entries.iter().any(|entry| owns(entry, &key)) {
        return None;
    }
    let before = old.and_then(self::entries).unwrap_or_default();
    let next: Vec<Value> = entries
        .iter()
        .filter_map(|entry| {
            if !owns(entry, &key) {
                return Some(entry.clone());
            }
            let mut entry = without(entry, &key)?;
            if let Some(same) = before.iter().find(|old| same_but_time(old, &entry))
                && let Some(time) = same.get("time")
            {
                entry["time"] = time.clone();
            }
            Some(entry)
        })
        .collect();
    Some(Operation::add("/metadata/managedFields", next))
}

/// Whether anybody owns `spec.<field>`.
#[must_use]
pub fn is_owned(object: &Value, field: &str) -> bool {
    let key = format!("f:{field}");
    entries(object).is_some_and(|entries| entries.iter().any(|entry| owns(entry, &key)))
}

fn entries(object: &Value) -> Option<Vec<Value>> {
    object.pointer("/metadata/managedFields")?.as_array().cloned()
}

fn owns(entry: &Value, key: &str) -> bool {
    entry
        .get("fieldsV1")
        .and_then(|fields| fields.get("f:spec"))
        .and_then(|spec| spec.get(key))
        .is_some()
}

/// The entry without the field. An empty `f:spec` would mean to own `spec` itself, so it goes too, and an entry that
/// owns nothing goes as a whole.
fn without(entry: &Value, key: &str) -> Option<Value> {
    let mut entry = entry.clone();
    let fields: &mut Map<String, Value> = entry.get_mut("fieldsV1")?.as_object_mut()?;
    let spec = fields.get_mut("f:spec")?.as_object_mut()?;
    spec.remove(key);
    if spec.is_empty() {
        fields.remove("f:spec");
    }
    if fields.is_empty() {
        return None;
    }
    Some(entry)
}

fn same_but_time(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else {
        return false;
    };
    let rest = |map: &Map<String, Value>| {
        let mut map = map.clone();
        map.remove("time");
        map
    };
    rest(a) == rest(b)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn entry(manager: &str, time: &str, spec: Value) -> Value {
        json!({"manager": manager, "operation": "Apply", "time": time, "fieldsV1": {"f:spec": spec}})
    }

    #[test]
    fn nobody_owns_it_after() {
        let object = json!({"metadata": {"managedFields": [
            entry("kubectl", "2", json!({"f:replicas": {}, "f:template": {}})),
            {"manager": "gate", "operation": "Update", "subresource": "scale", "time": "2",
             "fieldsV1": {"f:spec": {"f:replicas": {}}}},
            {"manager": "kcm", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {}}},
        ]}});
        let old = json!({"metadata": {"managedFields": [entry("kubectl", "1", json!({"f:template": {}}))]}});
        let Some(Operation::Add { path, value }) = disown(&object, Some(&old), "replicas") else {
            panic!("nothing was taken out");
        };
        assert_eq!(path, "/metadata/managedFields");
        assert_eq!(
            value,
            json!([
                entry("kubectl", "1", json!({"f:template": {}})),
                {"manager": "kcm", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {}}},
            ])
        );
        let after = json!({"metadata": {"managedFields": value}});
        assert_eq!(disown(&after, Some(&old), "replicas"), None);
    }
}
