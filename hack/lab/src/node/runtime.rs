//! What all pods of a set of nodes share: the API client, the launcher of processes, the image table.

use super::call;
use super::container::Instance;
use super::events::{Happening, Recorder};
use super::exec::{Mount, Plan};
use super::images::{self, CommandLine, Images};
use super::process::{Launcher, PATH, Running};
use super::services::Table;
use crate::nvml_state;
use k8s_openapi::api::core::v1::LifecycleHandler;
use kube::Client;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::sync::watch;

/// How a set of nodes runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder for logs, volumes and the nodes' GPU state.
    pub dir: PathBuf,
    /// Which program stands for which image.
    pub images: Images,
    /// The `lab` program, started again inside every container.
    pub lab: PathBuf,
    /// Folder of `libnvidia-ml.so.1`.
    pub libraries: PathBuf,
    /// The third byte of the first node's 10.77.x.0/24; processes on one cluster keep apart by it.
    pub first_index: u8,
    /// How many nodes at once, counted from `first_index`.
    pub most: u8,
    /// The first pause of a crash loop.
    pub restart_backoff: Duration,
    /// How often volumes are brought up to date.
    pub volume_refresh: Duration,
}

impl Options {
    /// The usual settings, with everything in `dir`.
    ///
    /// # Errors
    /// When the `lab` program cannot be found.
    pub fn new(dir: impl Into<PathBuf>, images: Images) -> anyhow::Result<Self> {
        let lab = lab_program()?;
        let libraries = nvml_state::library_dir().to_owned();
        Ok(Self {
            dir: dir.into(),
            images,
            lab,
            libraries,
            first_index: 1,
            most: 99,
            restart_backoff: Duration::from_secs(10),
            volume_refresh: Duration::from_secs(30),
        })
    }
}

/// Finds the `lab` program: this one, or the one built beside the running test.
///
/// # Errors
/// Says where it was looked for.
pub fn lab_program() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("EBB_LAB_PROGRAM") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("lab"))
        .find(|path| path.is_file());
    if own.file_name().is_some_and(|name| name == "lab") {
        return Ok(own);
    }
    beside.ok_or_else(|| {
        anyhow::anyhow!(
            "no `lab` program beside {}: run `cargo build -p ebb-lab` or set EBB_LAB_PROGRAM",
            own.display()
        )
    })
}

/// The parts every pod worker uses.
pub struct Runtime {
    /// The API server.
    pub client: Client,
    /// Settings.
    pub options: Options,
    /// Starts processes.
    pub launcher: Launcher,
    /// Writes Events.
    pub recorder: Recorder,
    /// The cluster's Services, `None` until listed once.
    pub services: watch::Receiver<Option<Table>>,
}

/// Everything needed to start one container.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program and its arguments.
    pub line: CommandLine,
    /// Its complete environment.
    pub env: &'a BTreeMap<String, String>,
    /// Its mounts.
    pub mounts: Vec<Mount>,
    /// Its hostname, unless it has the node's.
    pub hostname: Option<String>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// The pod's folder.
    pub dir: &'a Path,
    /// The container's name.
    pub name: &'a str,
}

impl Runtime {
    /// Records an Event.
    pub fn event(&self, happening: Happening) {
        self.recorder.record(happening);
    }

    /// Starts a container's process; its output goes to `<name>.log`, the run before to `<name>.log.1`.
    ///
    /// # Errors
    /// When a file cannot be written or the process not be started.
    pub async fn launch(&self, launch: Launch<'_>) -> io::Result<Running> {
        let file = |suffix: &str| launch.dir.join(format!("{}{suffix}", launch.name));
        let staging = file(".staging");
        std::fs::create_dir_all(&staging)?;
        let plan = Plan {
            mounts: launch.mounts,
            hostname: launch.hostname,
            cwd: launch.cwd,
            program: launch.line.program,
            args: launch.line.args,
            staging,
        };
        let plan_file = file(".plan.json");
        std::fs::write(&plan_file, serde_json::to_vec_pretty(&plan)?)?;
        let log = file(".log");
        if log.exists() {
            std::fs::rename(&log, file(".log.1"))?;
        }
        let out = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&self.options.lab);
        command
            .args(["node-exec", "--plan"])
            .arg(&plan_file)
            .env_clear()
            .envs(launch.env)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let running = self.launcher.spawn(command).await?;
        std::fs::write(file(".pid"), format!("{}\n", running.pid()))?;
        Ok(running)
    }

    /// Runs `command` in the namespaces of `instance`; its status and at most `limit` bytes of output.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn exec(
        self: Arc<Self>,
        instance: &Instance,
        command: &[String],
        limit: usize,
    ) -> io::Result<(ExitStatus, String)> {
        let line = images::command_line(&instance.program, command, &[]).map_err(io::Error::other)?;
        let (reader, writer) = io::pipe()?;
        let mut process = Command::new(&self.options.lab);
        process
            .args(["node-exec", "--join", &instance.pid.to_string(), "--"])
            .arg(&line.program)
            .args(&line.args)
            .env_clear()
            .envs(&*instance.env)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut running = self.launcher.spawn(process).await?;
        let mut reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader.into())?;
        let mut output = vec![0; limit];
        let mut filled = 0;
        let read = async {
            let mut rest = [0; 4096];
            loop {
                let target = if filled < limit {
                    &mut output[filled..]
                } else {
                    &mut rest[..]
                };
                match reader.read(target).await {
                    Ok(0) | Err(_) => break,
                    Ok(n) => filled = (filled + n).min(limit),
                }
            }
        };
        let (status, ()) = tokio::join!(running.wait(), read);
        output.truncate(filled);
        Ok((status, String::from_utf8_lossy(&output).into_owned()))
    }

    /// Runs a lifecycle hook of `instance`.
    ///
    /// # Errors
    /// Says how it failed.
    pub async fn hook(
        self: &Arc<Self>,
        instance: &Instance,
        handler: &LifecycleHandler,
    ) -> Result<(), String> {
        if let Some(action) = &handler.exec {
            super::probes::exec(instance, action).await.map(drop)
        } else if let Some(action) = &handler.http_get {
            call::http(&instance.container, &instance.pod_ip, action).await
        } else if let Some(sleep) = &handler.sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
            Ok(())
        } else {
            Ok(())
        }
    }

    /// Adds what a container runtime with NVIDIA's hook adds when the container asks for GPUs.
    pub fn nvidia(&self, env: &mut BTreeMap<String, String>, state: Option<&Path>) {
        let asked = env
            .get("NVIDIA_VISIBLE_DEVICES")
            .is_some_and(|value| !value.is_empty() && value != "void");
        let Some(state) = state.filter(|_| asked) else {
            return;
        };
        let libraries = self.options.libraries.to_string_lossy().into_owned();
        let path = match env.get("LD_LIBRARY_PATH") {
            Some(rest) if !rest.is_empty() => format!("{libraries}:{rest}"),
            _ => libraries,
        };
        env.insert("LD_LIBRARY_PATH".to_owned(), path);
        env.insert(
            nvml_state::STATE_ENV.to_owned(),
            state.to_string_lossy().into_owned(),
        );
    }
}

/// What every image brings, under what the container sets itself.
pub fn image_environment(env: &mut BTreeMap<String, String>, hostname: &str) {
    for (name, value) in [("PATH", PATH), ("HOME", "/root"), ("HOSTNAME", hostname)] {
        env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
}
