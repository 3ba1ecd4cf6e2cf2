//! JSON Patch (RFC 6902) operations, and the few shapes of change that admission makes.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Operation {
    /// Sets a member, whether it is there or not.
    Add {
        /// JSON pointer.
        path: String,
        /// What to put there.
        value: Value,
    },
    /// Removes a member that is there.
    Remove {
        /// JSON pointer.
        path: String,
    },
}

impl Operation {
    /// Sets a member.
    pub fn add(path: impl Into<String>, value: impl Into<Value>) -> Self {
        Operation::Add {
            path: path.into(),
            value: value.into(),
        }
    }
}

/// A member's name as one step of a JSON pointer.
#[must_use]
pub fn step(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Makes the text map at `pointer` hold `wanted`: a text is set, a `None` is removed. Other keys stay.
#[must_use]
pub fn set_texts(object: &Value, pointer: &str, wanted: &BTreeMap<&str, Option<String>>) -> Vec<Operation> {
    let present = object.pointer(pointer).and_then(Value::as_object);
    let Some(present) = present else {
        let map: Map<String, Value> = wanted
            .iter()
            .filter_map(|(key, text)| Some(((*key).to_owned(), Value::from(text.clone()?))))
            .collect();
        if map.is_empty() {
            return Vec::new();
        }
        return vec![Operation::add(pointer, map)];
    };
    wanted
        .iter()
        .filter_map(|(key, text)| {
            let path = format!("{pointer}/{}", step(key));
            match (present.get(*key), text) {
                (Some(now), Some(text)) if now.as_str() == Some(text) => None,
                (_, Some(text)) => Some(Operation::add(path, text.clone())),
                (Some(_), None) => Some(Operation::Remove { path }),
                (None, None) => None,
            }
        })
        .collect()
}
