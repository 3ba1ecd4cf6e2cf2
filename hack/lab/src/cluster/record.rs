//! The note that a cluster runs, for `hack/enter`, which finds it from outside
//! of the cluster's namespaces.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::json;

/// A note, as long as it lives. `hack/isolate` removes that of a killed process.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
}

impl Record {
    /// Writes it. `None` where `hack/isolate` did not say who it is.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(dir: &Path, kubeconfig: &Path, programs: &Path) -> anyhow::Result<Option<Self>> {
        let variable = |name: &str| std::env::var(name).ok();
        let (Some(records), Some(pid), Some(start)) = (
            variable("EBB_ISOLATE_RECORDS"),
            variable("EBB_ISOLATE_OUTER_PID"),
            variable("EBB_ISOLATE_OUTER_START"),
        ) else {
            return Ok(None);
        };
        let records = Path::new(&records);
        // In /tmp it lies among other people's.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(records)
            .with_context(|| format!("making {}", records.display()))?;
        let path = records.join(format!("{pid}.json"));
        let temporary = records.join(format!(".{pid}.json"));
        let record = json!({
            "pid": pid,
            "start": start,
            "dir": dir,
            "kubeconfig": kubeconfig,
            "programs": programs,
        });
        // One key a line: bash reads it.
        std::fs::write(&temporary, format!("{record:#}\n"))
            .and_then(|()| std::fs::rename(&temporary, &path))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(Some(Self { path }))
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
