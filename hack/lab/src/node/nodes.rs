//! A set of stand-in nodes in this process: add, remove, crash.

use super::images::Images;
use super::machine::Machine;
use super::pod::Known;
use super::process::Launcher;
use super::runtime::{Options, Runtime};
use super::spec::NodeSpec;
use super::{cgroups, events, kubelet_api, lock, pod_resources, registration, services, worker};
use anyhow::Context as _;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// Stand-in nodes that run pods as processes of this machine. Dropping it kills them all.
pub struct Nodes {
    runtime: Arc<Runtime>,
    machines: Arc<Mutex<Machines>>,
    acceptor: TlsAcceptor,
    commands: mpsc::UnboundedSender<Command>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Machines {
    by_name: BTreeMap<String, Up>,
    last_index: u8,
    /// Nodes that register right now.
    starting: BTreeMap<String, u8>,
}

struct Up {
    machine: Arc<Machine>,
    /// What it does besides running pods; ends when this is dropped.
    tasks: Vec<AbortOnDropHandle<()>>,
}

/// What the dispatcher is told besides the watch.
#[derive(Debug)]
enum Command {
    /// Serve the pods of this node.
    Added(Arc<Machine>),
    /// Forget it; answered once its pods' workers have been told.
    Removed(String, oneshot::Sender<()>),
}

impl Nodes {
    /// Gets ready to run nodes; none is there yet.
    ///
    /// # Errors
    /// When the folder cannot be made or no thread started.
    pub async fn start(client: Client, options: Options) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&options.dir).with_context(|| format!("making {}", options.dir.display()))?;
        let options = Options {
            dir: options.dir.canonicalize()?,
            ..options
        };
        let (recorder, write_events) = events::Recorder::new(client.clone());
        let (services, follow_services) = services::follow(client.clone());
        let machines = Machines {
            last_index: options.first_index.wrapping_sub(1),
            ..Machines::default()
        };
        let launcher = Launcher::start().context("starting the launcher's thread")?;
        let runtime = Arc::new(Runtime {
            client,
            options,
            launcher,
            recorder,
            services,
        });
        let (commands, receiver) = mpsc::unbounded_channel();
        let dispatcher = Dispatcher {
            runtime: Arc::clone(&runtime),
            machines: HashMap::new(),
            bound: HashMap::new(),
            workers: HashMap::new(),
        };
        let tasks = vec![
            AbortOnDropHandle::new(tokio::spawn(write_events)),
            AbortOnDropHandle::new(tokio::spawn(follow_services)),
            AbortOnDropHandle::new(tokio::spawn(dispatcher.run(receiver))),
        ];
        Ok(Self {
            runtime,
            machines: Arc::new(Mutex::new(machines)),
            acceptor: kubelet_api::acceptor()?,
            commands,
            _tasks: tasks,
        })
    }

    /// The image table, which may be added to at any time.
    pub fn images(&self) -> &Images {
        &self.runtime.options.images
    }

    /// Boots a node: it registers and takes pods.
    ///
    /// # Errors
    /// When a node of that name runs here, no address range is left, or the API server refuses.
    pub async fn add(&self, spec: NodeSpec) -> anyhow::Result<()> {
        let name = spec.name.clone();
        let index = self.take_index(&name)?;
        let result = self.boot(spec, index).await;
        lock(&self.machines).starting.remove(&name);
        result
    }

    async fn boot(&self, spec: NodeSpec, index: u8) -> anyhow::Result<()> {
        let name = spec.name.clone();
        let dir = self.runtime.options.dir.join("nodes").join(&name);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        // Of processes that ended with the power.
        let _ = std::fs::remove_dir_all(cgroups::proc_dir(&dir));
        let state_file = spec.gpus.as_ref().map(|_| dir.join("nvml.state"));
        if let (Some(file), Some(state)) = (&state_file, spec.gpu_state()) {
            state
                .create(file)
                .with_context(|| format!("writing {}", file.display()))?;
        }
        let machine = Arc::new(Machine::new(spec, index, dir, state_file));
        let images = self.images().clone();
        let uid = registration::register(&self.runtime.client, &machine, &images)
            .await
            .with_context(|| format!("registering node {name}"))?;
        let heart = {
            let (client, machine) = (self.runtime.client.clone(), Arc::clone(&machine));
            tokio::spawn(async move { registration::heartbeat(client, &machine, &images, &uid).await })
        };
        let mut tasks = vec![AbortOnDropHandle::new(heart)];
        match tokio::net::TcpListener::bind((machine.ip.as_str(), kubelet_api::PORT)).await {
            Ok(listener) => {
                let pods = self.runtime.options.dir.join("pods");
                let serve = kubelet_api::serve(listener, self.acceptor.clone(), pods);
                tasks.push(AbortOnDropHandle::new(tokio::spawn(serve)));
            }
            // Everything but `kubectl logs` works.
            Err(error) => tracing::warn!(node = name, %error, "the kubelet's API cannot listen"),
        }
        let socket = machine.kubelet_dir().join(pod_resources::SOCKET);
        match pod_resources::listen(&socket) {
            Ok(listener) => {
                let serve = pod_resources::serve(listener, socket.with_file_name(pod_resources::ALLOCATIONS));
                tasks.push(AbortOnDropHandle::new(tokio::spawn(serve)));
            }
            Err(error) => tracing::warn!(node = name, "no PodResources: {error:#}"),
        }
        let up = Up {
            machine: Arc::clone(&machine),
            tasks,
        };
        lock(&self.machines).by_name.insert(name, up);
        let _ = self.commands.send(Command::Added(machine));
        Ok(())
    }

    fn take_index(&self, name: &str) -> anyhow::Result<u8> {
        let mut machines = lock(&self.machines);
        let taken = machines.by_name.contains_key(name) || machines.starting.contains_key(name);
        anyhow::ensure!(!taken, "node {name} runs already");
        let up = machines.by_name.values().map(|up| up.machine.index);
        let used: HashSet<u8> = up.chain(machines.starting.values().copied()).collect();
        let (first, most) = (self.runtime.options.first_index, self.runtime.options.most);
        // Round and round, so that the pods of a node that was removed do not share addresses with those of the next.
        let mut index = machines.last_index;
        for _ in 0..most {
            index = if index < first || index.saturating_sub(first) + 1 >= most || index == 255 {
                first
            } else {
                index + 1
            };
            if !used.contains(&index) {
                machines.last_index = index;
                machines.starting.insert(name.to_owned(), index);
                return Ok(index);
            }
        }
        anyhow::bail!("no address range is left for node {name}: {most} nodes run in this process")
    }

    /// Takes a node away: its processes are killed, then its object is deleted.
    ///
    /// # Errors
    /// When there is no such node here or the API server refuses.
    pub async fn remove(&self, name: &str) -> anyhow::Result<()> {
        self.crash(name).await?;
        registration::deregister(&self.runtime.client, name)
            .await
            .with_context(|| format!("deleting node {name}"))
    }

    /// Cuts a node's power: its processes die and it stops reporting; its object stays.
    ///
    /// # Errors
    /// When there is no such node here.
    pub async fn crash(&self, name: &str) -> anyhow::Result<()> {
        let up = lock(&self.machines)
            .by_name
            .remove(name)
            .with_context(|| format!("no node {name} runs here"))?;
        up.machine.power.cancel();
        drop(up.tasks);
        let (done, forgotten) = oneshot::channel();
        let _ = self.commands.send(Command::Removed(name.to_owned(), done));
        let _ = forgotten.await;
        up.machine.pods.close();
        up.machine.pods.wait().await;
        up.machine.forget_dead_gpu_processes().await;
        Ok(())
    }

    /// The names of the nodes that run.
    pub fn names(&self) -> Vec<String> {
        lock(&self.machines).by_name.keys().cloned().collect()
    }

    /// Ends all nodes in this process: processes are killed, objects stay.
    pub async fn power_off(&self) {
        for name in self.names() {
            let _ = self.crash(&name).await;
        }
    }
}

struct Worker {
    node: String,
    known: watch::Sender<Known>,
}

/// Hands the pods of one shared watch to the workers of the nodes.
struct Dispatcher {
    runtime: Arc<Runtime>,
    machines: HashMap<String, Arc<Machine>>,
    /// Every bound pod of the cluster: a node may come up after its pods.
    bound: HashMap<String, Arc<Pod>>,
    workers: HashMap<String, Worker>,
}

impl Dispatcher {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let api: Api<Pod> = Api::all(self.runtime.client.clone());
        let config = watcher::Config::default().fields("spec.nodeName!=");
        let mut stream = watcher(api, config).default_backoff().boxed();
        let mut listed = HashSet::new();
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                event = stream.next() => match event {
                    Some(Ok(watcher::Event::Init)) => listed.clear(),
                    Some(Ok(watcher::Event::InitApply(pod))) => {
                        listed.extend(pod.uid());
                        self.apply(Arc::new(pod));
                    }
                    Some(Ok(watcher::Event::InitDone)) => {
                        let gone: Vec<String> = self.bound.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                        gone.iter().for_each(|uid| self.gone(uid));
                    }
                    Some(Ok(watcher::Event::Apply(pod))) => self.apply(Arc::new(pod)),
                    Some(Ok(watcher::Event::Delete(pod))) => self.gone(&pod.uid().unwrap_or_default()),
                    Some(Err(error)) => tracing::warn!(%error, "watching pods"),
                    None => return,
                },
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Added(machine) => {
                let name = machine.spec.name.clone();
                self.machines.insert(name.clone(), machine);
                let waiting = self.bound.values().filter(|pod| node_of(pod) == Some(&name));
                let waiting: Vec<_> = waiting.cloned().collect();
                waiting.into_iter().for_each(|pod| self.apply(pod));
            }
            Command::Removed(name, done) => {
                self.machines.remove(&name);
                self.workers.retain(|_, worker| worker.node != name);
                let _ = done.send(());
            }
        }
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        let (Some(uid), Some(node)) = (pod.uid(), node_of(&pod).map(str::to_owned)) else {
            return;
        };
        self.bound.insert(uid.clone(), Arc::clone(&pod));
        if let Some(worker) = self.workers.get(&uid) {
            worker.known.send_modify(|known| known.pod = pod);
        } else if let Some(machine) = self.machines.get(&node) {
            let (known, receiver) = watch::channel(Known { pod, gone: false });
            machine.pods.spawn(worker::run(
                Arc::clone(&self.runtime),
                Arc::clone(machine),
                receiver,
            ));
            self.workers.insert(uid, Worker { node, known });
        }
    }

    fn gone(&mut self, uid: &str) {
        self.bound.remove(uid);
        if let Some(worker) = self.workers.remove(uid) {
            worker.known.send_modify(|known| known.gone = true);
        }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec
        .as_ref()
        .and_then(|spec| spec.node_name.as_deref())
        .filter(|name| !name.is_empty())
}
