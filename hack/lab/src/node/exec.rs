//! `lab node-exec`: the last steps inside a new process before it becomes a container.
//!
//! What a container runtime does between fork and exec (a mount namespace, the volumes, the
//! hostname) is done by a second start of this program, because doing it in the forked child
//! itself takes `unsafe` code. It must stay single-threaded: the kernel moves only such a process
//! between mount namespaces.

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path, PathBuf};

/// Arguments of the hidden subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the plan of a new container.
    #[arg(long, conflicts_with = "join")]
    plan: Option<PathBuf>,
    /// Run the command beside this process, in its namespaces.
    #[arg(long)]
    join: Option<u32>,
    /// The command to run with --join.
    #[arg(last = true)]
    command: Vec<String>,
}

/// One mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// File or folder on the node.
    pub source: PathBuf,
    /// Where the container sees it.
    pub target: PathBuf,
    /// Whether the container may not write to it.
    pub read_only: bool,
}

/// What a new container is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The mounts.
    pub mounts: Vec<Mount>,
    /// The hostname it sees, if it has one of its own.
    pub hostname: Option<String>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// An empty folder to build changed directories in.
    pub staging: PathBuf,
}

/// Becomes the container; returns only when that failed.
///
/// # Errors
/// Says which step failed.
pub fn run(args: Args) -> anyhow::Result<()> {
    // A container does not outlive its node, however that ends.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("asking to end with the node")?;
    let mut command = match (args.plan, args.join) {
        (Some(path), _) => {
            let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            enter(&serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?)?
        }
        (None, Some(pid)) => join(pid, &args.command)?,
        (None, None) => anyhow::bail!("node-exec needs --plan or --join"),
    };
    let program = command.get_program().to_owned();
    Err(command.exec()).with_context(|| format!("running {}", program.display()))
}

fn join(pid: u32, command: &[String]) -> anyhow::Result<std::process::Command> {
    let (program, args) = command.split_first().context("no command to run")?;
    for (name, flag) in [
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ] {
        let path = format!("/proc/{pid}/ns/{name}");
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        setns(file, flag).with_context(|| format!("joining {path}"))?;
    }
    let mut command = std::process::Command::new(program);
    command.args(args);
    Ok(command)
}

fn enter(plan: &Plan) -> anyhow::Result<std::process::Command> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
        .context("no mount namespace of its own: run inside hack/isolate or as root")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    if let Some(hostname) = &plan.hostname {
        // Not through /proc: that file is the machine's root's, whoever is root in here.
        nix::unistd::sethostname(hostname).context("setting the hostname")?;
    }
    // Opened before anything is mounted: a mount may hide the source of a later one.
    let mut mounts = Vec::new();
    for mount in &plan.mounts {
        let source = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::fcntl::OFlag::O_PATH.bits())
            .open(&mount.source)
            .with_context(|| format!("opening {}", mount.source.display()))?;
        mounts.push((mount, source));
    }
    // Outer folders first, as a runtime does, whatever the order in the pod.
    mounts.sort_by_key(|(mount, _)| mount.target.components().count());
    let mut owned = Owned {
        staging: plan.staging.clone(),
        roots: Vec::new(),
    };
    for (mount, source) in &mounts {
        owned
            .bind(source, &mount.target)
            .with_context(|| format!("mounting at {}", mount.target.display()))?;
    }
    for (entry, _) in mounts.iter().filter(|(mount, _)| mount.read_only) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        // In a user namespace flags that came with the mount are locked and have to be repeated.
        mount(none, &entry.target, none, flags, none)
            .or_else(|_| {
                mount(
                    none,
                    &entry.target,
                    none,
                    flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                    none,
                )
            })
            .with_context(|| format!("making {} read-only", entry.target.display()))?;
    }
    std::env::set_current_dir(&plan.cwd).with_context(|| format!("entering {}", plan.cwd.display()))?;
    let mut command = std::process::Command::new(&plan.program);
    command.args(&plan.args);
    Ok(command)
}

/// The folders that belong to this container alone, where mount points can be made.
struct Owned {
    staging: PathBuf,
    roots: Vec<PathBuf>,
}

impl Owned {
    fn bind(&mut self, source: &File, target: &Path) -> anyhow::Result<()> {
        let is_dir = source.metadata()?.is_dir();
        let target = self.make(target, is_dir)?;
        let from = format!("/proc/self/fd/{}", source.as_raw_fd());
        let none = None::<&str>;
        mount(
            Some(from.as_str()),
            &target,
            none,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            none,
        )?;
        if is_dir {
            self.roots.push(target);
        }
        Ok(())
    }

    /// Makes sure that `target` exists, without leaving a trace on the machine's own disk.
    fn make(&mut self, target: &Path, is_dir: bool) -> anyhow::Result<PathBuf> {
        let (existing, missing) = split(target)?;
        if missing.as_os_str().is_empty() {
            return Ok(existing);
        }
        let existing = if self.roots.iter().any(|root| existing.starts_with(root)) {
            existing
        } else {
            shadow(&existing, &self.staging)?;
            self.roots.push(existing.clone());
            existing
        };
        let full = existing.join(missing);
        if is_dir {
            std::fs::create_dir_all(&full)?;
        } else {
            std::fs::create_dir_all(full.parent().unwrap_or(&existing))?;
            File::create(&full)?;
        }
        Ok(full)
    }
}

/// The deepest part of `target` that exists, without links in it, and the rest.
fn split(target: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    anyhow::ensure!(
        target.is_absolute() && target.components().all(|part| part != Component::ParentDir),
        "a mount path must be absolute and without .."
    );
    let mut missing = PathBuf::new();
    for ancestor in target.ancestors() {
        match ancestor.canonicalize() {
            Ok(existing) => return Ok((existing, missing)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let name = ancestor.file_name().context("/ does not exist")?;
                missing = if missing.as_os_str().is_empty() {
                    name.into()
                } else {
                    Path::new(name).join(missing)
                };
            }
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("/ does not exist")
}

/// Puts a folder of the container's own in place of `dir`, with the same entries.
fn shadow(dir: &Path, staging: &Path) -> anyhow::Result<()> {
    let none = None::<&str>;
    mount(
        Some("tmpfs"),
        staging,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755,size=16m"),
    )
    .context("mounting a tmpfs")?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let copy = staging.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path())?, &copy)?;
            continue;
        }
        if kind.is_dir() {
            std::fs::create_dir(&copy)?;
        } else {
            File::create(&copy)?;
        }
        let bound = mount(
            Some(&entry.path()),
            &copy,
            none,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            none,
        );
        // A folder such as /tmp changes while it is read: what is gone again is not missed.
        if let Err(error) = bound
            && entry.path().exists()
        {
            return Err(error).with_context(|| format!("keeping {}", entry.path().display()));
        }
    }
    std::fs::set_permissions(staging, std::fs::metadata(dir)?.permissions())?;
    if dir == Path::new("/") {
        std::env::set_current_dir(staging)?;
        mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context("changing the root")?;
        nix::unistd::chroot(".").context("changing the root")?;
        std::env::set_current_dir("/")?;
    } else {
        mount(Some(staging), dir, none, MsFlags::MS_MOVE, none).context("moving the folder into place")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_path_is_split_where_it_stops_to_exist() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("run")).unwrap();
        std::os::unix::fs::symlink("run", real.join("var-run")).unwrap();
        let (existing, missing) = split(&dir.path().join("var-run/secrets/x")).unwrap();
        assert_eq!(
            (existing, missing),
            (real.join("run"), PathBuf::from("secrets/x"))
        );
        let (existing, missing) = split(&real.join("run")).unwrap();
        assert_eq!((existing, missing), (real.join("run"), PathBuf::new()));
        assert!(split(Path::new("relative")).is_err());
        assert!(split(Path::new("/a/../b")).is_err());
    }
}
