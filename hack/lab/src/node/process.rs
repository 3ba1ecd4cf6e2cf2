//! Starting and ending the processes of containers.

use super::lock;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

/// The search path of every container.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct Job {
    command: Command,
    reply: oneshot::Sender<io::Result<Child>>,
}

/// Starts processes from one thread of its own, and kills what is left when it is dropped.
///
/// The kernel's "kill me when my parent dies" means the parent *thread*: a thread of the runtime's
/// pool could end while the node lives on, this one lives exactly as long as the nodes.
#[derive(Debug)]
pub struct Launcher {
    jobs: std::sync::mpsc::Sender<Job>,
    groups: Arc<Mutex<BTreeSet<i32>>>,
}

impl Launcher {
    /// Starts the thread; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Self> {
        let (jobs, receiver) = std::sync::mpsc::channel::<Job>();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name("lab-launcher".to_owned())
            .spawn(move || {
                let _inside = runtime.enter();
                while let Ok(mut job) = receiver.recv() {
                    // Nobody waits any more: the child is dropped, and killed by that.
                    let _ = job.reply.send(job.command.spawn());
                }
            })?;
        Ok(Self {
            jobs,
            groups: Arc::default(),
        })
    }

    /// Starts `command` as the leader of a process group of its own.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub async fn spawn(&self, mut command: Command) -> io::Result<Running> {
        command.process_group(0).kill_on_drop(true);
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other("the nodes have stopped");
        self.jobs.send(Job { command, reply }).map_err(|_| gone())?;
        let child = answer.await.map_err(|_| gone())??;
        let pid = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .ok_or_else(|| io::Error::other("the process ended before it was seen"))?;
        lock(&self.groups).insert(pid);
        Ok(Running {
            child,
            pid: Pid::from_raw(pid),
            groups: Arc::clone(&self.groups),
        })
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        for pid in lock(&self.groups).iter() {
            let _ = killpg(Pid::from_raw(*pid), Signal::SIGKILL);
        }
    }
}

/// A started process and its group; dropping it kills both.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: Pid,
    groups: Arc<Mutex<BTreeSet<i32>>>,
}

impl Running {
    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Sends a signal to the main process alone, as a container runtime does.
    pub fn signal(&self, signal: Signal) {
        let _ = nix::sys::signal::kill(self.pid, signal);
    }

    /// Kills the whole group at once.
    pub fn kill(&self) {
        let _ = killpg(self.pid, Signal::SIGKILL);
    }

    /// Waits for the main process; what is left of its group then dies with it.
    pub async fn wait(&mut self) -> ExitStatus {
        let status = self.child.wait().await;
        self.kill();
        lock(&self.groups).remove(&self.pid.as_raw());
        status.unwrap_or_else(|error| {
            tracing::warn!(pid = self.pid.as_raw(), %error, "waiting for a process");
            ExitStatus::from_raw(Signal::SIGKILL as i32)
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Still listed: nobody saw it end.
        if lock(&self.groups).remove(&self.pid.as_raw()) {
            self.kill();
        }
    }
}

/// The exit code as a container runtime tells it, and the signal that ended the process.
pub fn exit_code(status: ExitStatus) -> (i32, Option<i32>) {
    match (status.code(), status.signal()) {
        (Some(code), _) => (code, None),
        (None, Some(signal)) => (128 + signal, Some(signal)),
        (None, None) => (137, None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(std::process::Stdio::null());
        command
    }

    fn alive(pid: i32) -> bool {
        nix::sys::signal::kill(Pid::from_raw(pid), None).is_ok()
    }

    #[tokio::test]
    async fn codes_and_signals_are_told_apart() {
        let launcher = Launcher::start().unwrap();
        let mut exits = launcher.spawn(shell("exit 3")).await.unwrap();
        assert_eq!(exit_code(exits.wait().await), (3, None));
        let mut killed = launcher.spawn(shell("sleep 60")).await.unwrap();
        killed.signal(Signal::SIGTERM);
        assert_eq!(exit_code(killed.wait().await), (143, Some(15)));
    }

    #[tokio::test]
    async fn crash_of_the_launcher_takes_every_process_along() {
        let launcher = Launcher::start().unwrap();
        let mut running = launcher.spawn(shell("sleep 60 & sleep 60")).await.unwrap();
        let pid = running.pid();
        assert!(alive(pid));
        drop(launcher);
        tokio::time::timeout(Duration::from_secs(5), running.wait())
            .await
            .unwrap();
        assert!(!alive(pid));
    }
}
