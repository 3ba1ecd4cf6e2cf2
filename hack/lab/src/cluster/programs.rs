//! The processes of a cluster: started with a log each, watched, and ended in
//! order.
//!
//! Each program is a process group of its own, so that Ctrl-C in a terminal
//! reaches only the process that brought the cluster up, and that one decides
//! who ends when.

use std::fs::OpenOptions;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::sync::watch;

pub use nix::sys::signal::Signal;

/// How long a program may take to end after SIGTERM, unless it is told otherwise.
pub const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A process that a cluster started. Clones are handles on the same process.
#[derive(Clone, Debug)]
pub struct Program {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    log: PathBuf,
    stop_limit: Duration,
    command: Mutex<Command>,
    state: watch::Sender<State>,
    // Held while a signal is sent and while the process is reaped: a pid that was reaped may already
    // belong to somebody else.
    reaping: Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Running(Pid),
    Ended(ExitStatus),
}

// A panic while one of these locks is held leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Program {
    /// Starts `command` with its output appended to `log`.
    ///
    /// # Errors
    /// If the program cannot be started or its log cannot be opened.
    pub fn start(name: &str, command: Command, log: PathBuf, stop_limit: Duration) -> anyhow::Result<Self> {
        let mut command = command;
        let child = spawn(name, &mut command, &log)?;
        let program = Self {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                log,
                stop_limit,
                command: Mutex::new(command),
                state: watch::channel(State::Running(pid_of(&child))).0,
                reaping: Mutex::new(()),
            }),
        };
        program.watch(child)?;
        Ok(program)
    }

    /// Its name, as given when it was started.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The file that holds what it prints.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.inner.log
    }

    /// The last lines of its log, for a message about it.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.inner.log, 25)
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        match *self.inner.state.borrow() {
            State::Running(pid) => pid.as_raw().try_into().ok(),
            State::Ended(_) => None,
        }
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<ExitStatus> {
        match *self.inner.state.borrow() {
            State::Running(_) => None,
            State::Ended(status) => Some(status),
        }
    }

    /// Sends it a signal. One that has ended is an error.
    ///
    /// # Errors
    /// If the program has ended.
    pub fn kill(&self, signal: Signal) -> anyhow::Result<()> {
        let _reaping = lock(&self.inner.reaping);
        match *self.inner.state.borrow() {
            State::Running(pid) => kill(pid, signal).with_context(|| format!("{signal} to {}", self.name())),
            State::Ended(status) => bail!("{} has already ended ({status})", self.name()),
        }
    }

    /// Waits until it ends.
    pub async fn wait(&self) -> ExitStatus {
        let mut state = self.inner.state.subscribe();
        loop {
            if let State::Ended(status) = *state.borrow_and_update() {
                return status;
            }
            if state.changed().await.is_err() {
                // The sender lives as long as `self`.
                return ExitStatus::from_raw(0);
            }
        }
    }

    /// Ends it (SIGTERM, then SIGKILL when its limit has passed) and returns how it ended.
    pub async fn stop(&self) -> ExitStatus {
        let _ = self.kill(Signal::SIGTERM);
        match tokio::time::timeout(self.inner.stop_limit, self.wait()).await {
            Ok(status) => status,
            Err(_) => {
                let _ = self.kill(Signal::SIGKILL);
                self.wait().await
            }
        }
    }

    /// [`Self::stop`] for where no runtime is at hand: it blocks the thread.
    pub fn stop_blocking(&self) {
        let group = match *self.inner.state.borrow() {
            State::Running(pid) => pid,
            State::Ended(_) => return,
        };
        let _ = self.kill(Signal::SIGTERM);
        if !self.ended_within(self.inner.stop_limit) {
            tracing::warn!(program = self.name(), "did not end in time after SIGTERM: killed");
            let _ = self.kill(Signal::SIGKILL);
            self.ended_within(Duration::from_secs(5));
        }
        // What it started itself and left behind.
        let _ = killpg(group, Signal::SIGKILL);
    }

    /// Starts it again, with the same arguments and log, after ending it if it still runs.
    ///
    /// # Errors
    /// If it cannot be started again.
    pub async fn restart(&self) -> anyhow::Result<()> {
        self.stop().await;
        let child = spawn(&self.inner.name, &mut lock(&self.inner.command), &self.inner.log)?;
        self.inner.state.send_replace(State::Running(pid_of(&child)));
        self.watch(child)
    }

    fn ended_within(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.ended().is_none() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    // A thread rather than a task: it works without a runtime, and after one.
    fn watch(&self, mut child: Child) -> anyhow::Result<()> {
        let inner = Arc::clone(&self.inner);
        std::thread::Builder::new()
            .name(format!("wait-{}", self.inner.name))
            .spawn(move || {
                let pid = pid_of(&child);
                while let Err(nix::errno::Errno::EINTR) =
                    waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
                {}
                let _reaping = lock(&inner.reaping);
                let status = child.wait().unwrap_or_default();
                inner.state.send_replace(State::Ended(status));
            })
            .context("a thread to wait for a program")?;
        Ok(())
    }
}

fn pid_of(child: &Child) -> Pid {
    // Linux pids fit: their upper bound is 2^22.
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

fn spawn(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Child> {
    let open = || {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))
    };
    command
        .stdin(Stdio::null())
        .stdout(open()?)
        .stderr(open()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {name} ({})", command.get_program().display()))
}

/// The last `lines` lines of a file, indented; says so if there are none.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    if all.is_empty() {
        return format!("  ({} is empty)", path.display());
    }
    let mut tail = String::new();
    for line in &all[all.len().saturating_sub(lines)..] {
        tail.push_str("  ");
        tail.push_str(line);
        tail.push('\n');
    }
    tail
}
