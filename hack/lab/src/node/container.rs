//! One container: created, started, probed, restarted and stopped.

use super::backoff::Backoff;
use super::events::Happening;
use super::exec::Mount;
use super::pod::PodContext;
use super::process::{Running, exit_code};
use super::runtime::{Launch, Runtime, image_environment};
use super::status::waiting;
use super::supervise::told_to_stop;
use super::{cgroups, environment, images, volumes};
use crate::nvml_state;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ObjectReference,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// What the pod asks of its containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Run.
    Run,
    /// Stop, gracefully until then.
    Stop(Instant),
    /// Die now.
    Kill,
}

/// Which part a container plays in its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the next one starts.
    Init,
    /// Runs beside the others and is always restarted.
    Sidecar,
    /// An ordinary container.
    Main,
}

/// How a container came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with 0 and is not restarted.
    Succeeded,
    /// It failed and is not restarted.
    Failed,
    /// It was told to stop.
    Stopped,
}

/// One run of a container: what probes and hooks need of it.
pub struct Instance {
    /// Shared parts.
    pub runtime: Arc<Runtime>,
    /// The container's spec.
    pub container: Container,
    /// The container's id, a new one in each run.
    pub id: String,
    /// The process.
    pub pid: i32,
    /// Its environment, which commands run beside it share.
    pub env: Arc<BTreeMap<String, String>>,
    /// The image's program.
    pub program: PathBuf,
    /// The pod's address.
    pub pod_ip: String,
    /// When it started.
    pub started: Instant,
    node_started: Instant,
    node: String,
    reference: ObjectReference,
}

impl Instance {
    /// How long the node has been up.
    pub fn node_age(&self) -> Duration {
        self.node_started.elapsed()
    }

    /// Records an Event about the container.
    pub fn event(&self, kind: &'static str, reason: &'static str, message: String) {
        let (object, node) = (self.reference.clone(), self.node.clone());
        self.runtime.event(Happening {
            object,
            node,
            kind,
            reason,
            message,
        });
    }
}

/// A container of a pod, before and between its runs.
pub struct Runner {
    pub(super) cx: Arc<PodContext>,
    pub(super) container: Container,
    role: Role,
    pub(super) order: watch::Receiver<Order>,
    volumes: Arc<BTreeMap<String, PathBuf>>,
    backoff: Backoff,
}

impl Runner {
    /// A container that has not started yet.
    pub fn new(
        cx: Arc<PodContext>,
        container: Container,
        role: Role,
        order: watch::Receiver<Order>,
        volumes: Arc<BTreeMap<String, PathBuf>>,
    ) -> Self {
        let backoff = Backoff::new(cx.runtime.options.restart_backoff);
        Self {
            cx,
            container,
            role,
            order,
            volumes,
            backoff,
        }
    }

    /// Runs the container until it is done or told to stop.
    pub async fn run(mut self) -> Outcome {
        loop {
            let Some(program) = self.pull().await else {
                return Outcome::Stopped;
            };
            let Some(exit) = self.one_run(program).await else {
                return Outcome::Stopped;
            };
            let code = exit.exit_code;
            if *self.order.borrow() != Order::Run {
                return Outcome::Stopped;
            }
            if !self.restarts(code) {
                return if code == 0 {
                    Outcome::Succeeded
                } else {
                    Outcome::Failed
                };
            }
            let pause = self.backoff.next(Instant::now());
            if !pause.is_zero() {
                let message = format!(
                    "back-off {}s restarting failed container={} pod={}",
                    pause.as_secs(),
                    self.container.name,
                    self.cx.title()
                );
                self.event(
                    "Warning",
                    "BackOff",
                    format!(
                        "Back-off restarting failed container {} in pod {}",
                        self.container.name,
                        self.cx.title()
                    ),
                );
                self.waits("CrashLoopBackOff", Some(message));
                if !self.pause(pause).await {
                    return Outcome::Stopped;
                }
            }
            self.update(|status| status.restart_count += 1);
        }
    }

    fn restarts(&self, code: i32) -> bool {
        match (self.role, self.cx.restart_policy()) {
            (Role::Sidecar, _) => true,
            (Role::Init, "Never") => false,
            (Role::Init, _) => code != 0,
            (Role::Main, "Never") => false,
            (Role::Main, "OnFailure") => code != 0,
            (Role::Main, _) => true,
        }
    }

    /// Waits for `pause`; false when told to stop.
    async fn pause(&mut self, pause: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = told_to_stop(&mut self.order) => false,
        }
    }

    /// The program of the image, once it is in the table; `None` when told to stop.
    async fn pull(&mut self) -> Option<PathBuf> {
        let image = self.container.image.clone().unwrap_or_default();
        let mut pause = Duration::from_secs(10);
        loop {
            if *self.order.borrow() != Order::Run {
                return None;
            }
            if let Some(program) = self.cx.runtime.options.images.program(&image) {
                return Some(program);
            }
            let error = format!(
                "failed to pull and unpack image {image:?}: failed to resolve reference {image:?}: {image}: not found"
            );
            self.event("Normal", "Pulling", format!("Pulling image {image:?}"));
            self.event(
                "Warning",
                "Failed",
                format!("Failed to pull image {image:?}: {error}"),
            );
            self.event("Warning", "Failed", "Error: ErrImagePull".to_owned());
            self.waits("ErrImagePull", Some(error.clone()));
            if !self.pause(Duration::from_secs(1)).await {
                return None;
            }
            self.event("Normal", "BackOff", format!("Back-off pulling image {image:?}"));
            self.event("Warning", "Failed", "Error: ImagePullBackOff".to_owned());
            self.waits(
                "ImagePullBackOff",
                Some(format!("Back-off pulling image {image:?}: ErrImagePull: {error}")),
            );
            if !self.pause(pause).await {
                return None;
            }
            pause = (pause * 2).min(Duration::from_secs(300));
        }
    }

    /// Creates, starts and watches one run; `None` when told to stop before it started.
    async fn one_run(&mut self, program: PathBuf) -> Option<ContainerStateTerminated> {
        let mut pause = Duration::from_millis(500);
        let env = loop {
            match self.environment().await {
                Ok(env) => break Arc::new(env),
                Err(message) => {
                    self.event("Warning", "Failed", format!("Error: {message}"));
                    self.waits("CreateContainerConfigError", Some(message));
                    if !self.pause(pause).await {
                        return None;
                    }
                    pause = (pause * 2).min(Duration::from_secs(8));
                }
            }
        };
        let began = Time(Timestamp::now());
        let mut running = match self.start(&program, &env).await {
            Ok(running) => running,
            Err(message) => {
                // As containerd reports a command that is not there.
                self.event("Warning", "Failed", format!("Error: {message}"));
                return Some(self.ended(128, None, "StartError", Some(message), began));
            }
        };
        if let Err(error) = cgroups::enter(&self.cx.node.dir, running.pid(), &self.cx.latest()) {
            tracing::warn!(pod = self.cx.name, %error, "writing the container's cgroup");
        }
        let id = self.container_id();
        let instance = Arc::new(Instance {
            id: id.clone(),
            runtime: Arc::clone(&self.cx.runtime),
            container: self.container.clone(),
            pid: running.pid(),
            env,
            program,
            pod_ip: self.cx.ip.clone(),
            started: Instant::now(),
            node_started: self.cx.node.started,
            node: self.cx.node.spec.name.clone(),
            reference: self.reference(),
        });
        self.update(|status| {
            if let Some(ended) = status.state.take().and_then(|state| state.terminated) {
                status.last_state = Some(ContainerState {
                    terminated: Some(ended),
                    ..ContainerState::default()
                });
            }
            let now = Some(Time(Timestamp::now()));
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning { started_at: now }),
                ..ContainerState::default()
            });
            status.container_id = Some(id);
            status.image_id.clone_from(&status.image);
        });
        self.event("Normal", "Started", "Container started".to_owned());
        let status = self.supervise(&mut running, &instance).await;
        cgroups::leave(&self.cx.node.dir, instance.pid);
        let _ = std::fs::remove_file(self.cx.dir.join(format!("{}.pid", self.container.name)));
        self.cx.node.forget_dead_gpu_processes().await;
        let (code, signal) = exit_code(status);
        let reason = if code == 0 { "Completed" } else { "Error" };
        let message = (code != 0).then(|| self.last_words()).flatten();
        Some(self.ended(code, signal, reason, message, began))
    }

    async fn environment(&self) -> Result<BTreeMap<String, String>, String> {
        let services = self.cx.services().await;
        let objects = environment::fetch(&self.cx.runtime.client, &self.cx.namespace, &self.container);
        let objects = objects.await.map_err(|error| error.to_string())?;
        // The pod as it is now: the scheduler's annotations came with the binding.
        let pod = self.cx.latest();
        let mut env = environment::resolve(&pod, &self.container, &self.cx.facts, &services, &objects)?;
        image_environment(&mut env, &self.cx.hostname());
        self.cx
            .runtime
            .nvidia(&mut env, self.cx.node.state_file.as_deref());
        if self.cx.host_pid() {
            let proc = cgroups::proc_dir(&self.cx.node.dir);
            env.entry(cgroups::HOST_PROC.to_owned())
                .or_insert_with(|| proc.to_string_lossy().into_owned());
        }
        Ok(env)
    }

    async fn start(
        &self,
        program: &std::path::Path,
        env: &BTreeMap<String, String>,
    ) -> Result<Running, String> {
        let command = environment::expand_all(self.container.command.as_ref(), env);
        let args = environment::expand_all(self.container.args.as_ref(), env);
        let line = images::command_line(program, &command, &args)?;
        let mut mounts = volumes::mounts(&self.container, &self.volumes, env)?;
        let hosts = PathBuf::from("/etc/hosts");
        if mounts.iter().all(|mount| mount.target != hosts) {
            mounts.push(Mount {
                source: self.cx.hosts_file(),
                target: hosts,
                read_only: false,
            });
        }
        let mut needed = vec![line.program.clone()];
        if env.contains_key(nvml_state::STATE_ENV) {
            needed.push(self.cx.runtime.options.libraries.clone());
            let state = self.cx.node.state_file.as_deref().and_then(Path::parent);
            needed.extend(state.map(Path::to_owned));
        }
        if self.cx.host_pid() {
            needed.push(self.cx.node.dir.clone());
        }
        volumes::keep_visible(&needed, &mut mounts);
        let image = self.container.image.as_deref().unwrap_or_default();
        self.event(
            "Normal",
            "Pulled",
            format!("Container image {image:?} already present on machine"),
        );
        let launch = Launch {
            line,
            env,
            mounts,
            hostname: (!self.cx.host_network()).then(|| self.cx.hostname()),
            cwd: self
                .container
                .working_dir
                .as_deref()
                .filter(|dir| !dir.is_empty())
                .unwrap_or("/")
                .into(),
            dir: &self.cx.dir,
            name: &self.container.name,
        };
        self.event("Normal", "Created", "Container created".to_owned());
        self.cx
            .runtime
            .launch(launch)
            .await
            .map_err(|error| error.to_string())
    }

    fn ended(
        &self,
        exit_code: i32,
        signal: Option<i32>,
        reason: &str,
        message: Option<String>,
        began: Time,
    ) -> ContainerStateTerminated {
        let ended = ContainerStateTerminated {
            exit_code,
            signal,
            reason: Some(reason.to_owned()),
            message,
            started_at: Some(began),
            finished_at: Some(Time(Timestamp::now())),
            container_id: Some(self.container_id()),
        };
        let state = ContainerState {
            terminated: Some(ended.clone()),
            ..ContainerState::default()
        };
        let done = self.role == Role::Init && exit_code == 0;
        self.update(|status| {
            if let Some(before) = status.state.take().and_then(|state| state.terminated) {
                status.last_state = Some(ContainerState {
                    terminated: Some(before),
                    ..ContainerState::default()
                });
            }
            status.state = Some(state);
            status.ready = done;
            status.started = Some(false);
            status.container_id.clone_from(&ended.container_id);
        });
        ended
    }

    /// The end of the log, for containers that ask for it (`terminationMessagePolicy: FallbackToLogsOnError`).
    fn last_words(&self) -> Option<String> {
        if self.container.termination_message_policy.as_deref() != Some("FallbackToLogsOnError") {
            return None;
        }
        let log = std::fs::read(self.cx.dir.join(format!("{}.log", self.container.name))).ok()?;
        let tail = &log[log.len().saturating_sub(2048)..];
        Some(String::from_utf8_lossy(tail).into_owned())
    }

    fn waits(&self, reason: &str, message: Option<String>) {
        self.update(|status| {
            if let Some(ended) = status.state.take().and_then(|state| state.terminated) {
                status.last_state = Some(ContainerState {
                    terminated: Some(ended),
                    ..ContainerState::default()
                });
            }
            status.state = Some(waiting(reason, message));
        });
    }

    fn update(&self, change: impl FnOnce(&mut k8s_openapi::api::core::v1::ContainerStatus)) {
        self.cx.update_container(&self.container.name, change);
    }

    fn container_id(&self) -> String {
        let restarts = self
            .cx
            .view
            .borrow()
            .find(&self.container.name)
            .map_or(0, |status| status.restart_count);
        format!("lab://{}-{}-{restarts}", self.cx.uid, self.container.name)
    }

    fn reference(&self) -> ObjectReference {
        let list = if self.role == Role::Main {
            "containers"
        } else {
            "initContainers"
        };
        let field_path = Some(format!("spec.{list}{{{}}}", self.container.name));
        ObjectReference {
            field_path,
            ..self.cx.reference.clone()
        }
    }

    fn event(&self, kind: &'static str, reason: &'static str, message: String) {
        let node = self.cx.node.spec.name.clone();
        self.cx.runtime.event(Happening {
            object: self.reference(),
            node,
            kind,
            reason,
            message,
        });
    }
}
