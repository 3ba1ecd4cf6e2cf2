//! The group's journal: what was asked of it, one JSON line per call.

use crate::node::lock;
use anyhow::Context as _;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes lines, or drops them when there is no file.
#[derive(Debug, Default)]
pub struct Journal {
    file: Option<Mutex<File>>,
}

impl Journal {
    /// A journal that appends to `path`.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let file = File::options().create(true).append(true).open(path);
        let file = file.with_context(|| format!("opening the journal {}", path.display()))?;
        Ok(Self {
            file: Some(Mutex::new(file)),
        })
    }

    /// Writes `fields` with the time in front.
    pub fn write(&self, fields: Value) {
        let Some(file) = &self.file else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = json!({"unix_ms": u64::try_from(now.as_millis()).unwrap_or(u64::MAX)});
        if let (Some(line), Value::Object(fields)) = (line.as_object_mut(), fields) {
            line.extend(fields);
        }
        // One write per line: readers never see half of one.
        if let Err(error) = lock(file).write_all(format!("{line}\n").as_bytes()) {
            tracing::warn!(%error, "writing the journal");
        }
    }
}
