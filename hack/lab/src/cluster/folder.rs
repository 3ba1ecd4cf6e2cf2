//! The folder of one cluster: data, certificates, logs. It goes with the
//! cluster; what a killed one left is swept up by the next.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;

const PREFIX: &str = "ebb-lab-";
/// Folders being made have another prefix until they are locked, so that no sweep takes them.
const NEW_PREFIX: &str = ".ebb-lab-";
const KEEP: &str = "keep";
const LOCK: &str = "lock";

/// A folder that belongs to this process while it lives.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    keep: bool,
    // An flock, which the kernel gives back however this process ends.
    _lock: File,
}

impl Folder {
    /// Makes a fresh one in the folder for temporary files.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(keep: bool) -> anyhow::Result<Self> {
        let parent = std::env::temp_dir();
        sweep(&parent);
        let new = tempfile::Builder::new()
            .prefix(NEW_PREFIX)
            .tempdir_in(&parent)
            .with_context(|| format!("making a folder in {}", parent.display()))?
            .keep();
        let lock = File::create(new.join(LOCK)).context("making the folder's lock")?;
        lock.try_lock().context("locking the folder")?;
        let name = new
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or(NEW_PREFIX);
        let path = parent.join(name.trim_start_matches('.'));
        std::fs::rename(&new, &path).with_context(|| format!("naming {}", path.display()))?;
        let mut folder = Self {
            path,
            keep: false,
            _lock: lock,
        };
        if keep {
            folder.keep();
        }
        Ok(folder)
    }

    /// Leaves it where it is when its owner ends, and out of every later sweep.
    pub fn keep(&mut self) {
        self.keep = true;
        if let Err(error) = File::create(self.path.join(KEEP)) {
            tracing::warn!(path = %self.path.display(), %error, "could not mark the folder to be kept");
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("lab: kept {}", self.path.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove the cluster's folder");
        }
    }
}

/// Removes the folders whose owner was killed.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let ours = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(PREFIX));
        if !ours || path.join(KEEP).exists() {
            continue;
        }
        // A folder without a lock file is not one of these (the folder of records, for one).
        let Ok(lock) = File::open(path.join(LOCK)) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}
