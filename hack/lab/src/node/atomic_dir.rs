//! Folders whose files change all at once, laid out as the kubelet does it: the
//! visible names are links through `..data`, which one rename points at a new folder.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Component, Path};

/// The files of one volume: path inside it → content and mode.
pub type Payload = BTreeMap<String, (Vec<u8>, u32)>;

/// Writes `payload` into `dir`, replacing what an earlier call wrote.
///
/// # Errors
/// When a path leads out of the folder or the disk refuses.
pub fn write(dir: &Path, payload: &Payload) -> io::Result<()> {
    let inside = |path: &str| {
        let path = Path::new(path);
        path.components().all(|part| matches!(part, Component::Normal(_)))
            && path.components().next().is_some()
    };
    if let Some(path) = payload.keys().find(|path| !inside(path)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("path {path:?} leads out of the volume"),
        ));
    }
    std::fs::create_dir_all(dir)?;
    let data = dir.join("..data");
    let before = std::fs::read_link(&data).ok();
    let fresh = tempfile::Builder::new().prefix("..").tempdir_in(dir)?.keep();
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755))?;
    for (path, (content, mode)) in payload {
        let file = fresh.join(path);
        std::fs::create_dir_all(file.parent().unwrap_or(&fresh))?;
        std::fs::write(&file, content)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(*mode))?;
    }
    let name = fresh.file_name().unwrap_or_default();
    let next = dir.join("..data_tmp");
    let _ = std::fs::remove_file(&next);
    symlink(name, &next)?;
    std::fs::rename(&next, &data)?;
    let visible: BTreeSet<&str> = payload.keys().filter_map(|path| path.split('/').next()).collect();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !visible.contains(&*name) {
            std::fs::remove_file(entry.path())?;
        }
    }
    for name in visible {
        let link = dir.join(name);
        if std::fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), &link)?;
        }
    }
    if let Some(before) = before {
        std::fs::remove_dir_all(dir.join(before))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (text.as_bytes().to_vec(), 0o644)))
            .collect()
    }

    #[test]
    fn files_change_together_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &payload(&[("a", "1"), ("sub/b", "2")])).unwrap();
        let first = std::fs::canonicalize(dir.path().join("a")).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("sub/b")).unwrap(), "2");
        write(dir.path(), &payload(&[("a", "3"), ("c", "4")])).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert!(!dir.path().join("sub").exists() && !first.exists());
        assert!(
            std::fs::symlink_metadata(dir.path().join("a"))
                .unwrap()
                .is_symlink()
        );
    }

    #[test]
    fn adversarial_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/etc/x", "a/../../x", ""] {
            assert!(write(dir.path(), &payload(&[(path, "")])).is_err(), "{path}");
        }
    }
}
