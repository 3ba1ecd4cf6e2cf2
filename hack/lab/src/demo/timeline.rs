//! The story as a person reads it: elapsed time, what happened, and why.

use std::fmt::Display;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::observe::{Grant, Moment, What};

/// A wait shorter than this shows no progress.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often a wait says that it is still one, where nothing can be redrawn.
const REMINDER: Duration = Duration::from_secs(10);

/// Where the story is printed; clones share it.
#[derive(Clone)]
pub struct Timeline {
    inner: Arc<Inner>,
}

struct Inner {
    start: Instant,
    terminal: bool,
    state: Mutex<Screen>,
}

#[derive(Default)]
struct Screen {
    /// Whether the last line is a progress line that the next one may replace.
    progress: bool,
    chapter: usize,
    /// The last reason printed and by whom: several writers may tell the same.
    last_told: String,
}

/// Colours, where a person looks.
#[derive(Clone, Copy)]
enum Ink {
    Plain,
    Bold,
    Faint,
    Green,
    Yellow,
    Blue,
    Red,
}

impl Timeline {
    /// A story that begins now.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                start: Instant::now(),
                terminal: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
                state: Mutex::default(),
            }),
        }
    }

    /// Time since the story began.
    pub fn elapsed(&self) -> Duration {
        self.inner.start.elapsed()
    }

    /// Opens a chapter.
    pub fn chapter(&self, title: &str) {
        let number = {
            let mut screen = self.screen();
            screen.chapter += 1;
            screen.chapter
        };
        self.line("");
        let title = format!("{number}. {title} ");
        let rule = "─".repeat(90_usize.saturating_sub(title.chars().count()));
        self.line(&format!(
            "{}{}",
            self.ink(Ink::Bold, &title),
            self.ink(Ink::Faint, &rule)
        ));
    }

    /// Something that was done or seen, now.
    pub fn say(&self, text: impl Display) {
        self.entry(Instant::now(), self.ink(Ink::Faint, "·"), &text.to_string());
    }

    /// A step that was verified.
    pub fn check(&self, text: impl Display) {
        self.entry(Instant::now(), self.ink(Ink::Green, "✔"), &text.to_string());
    }

    /// Something that failed.
    pub fn failed(&self, text: impl Display) {
        self.entry(
            Instant::now(),
            self.ink(Ink::Red, "✘"),
            &self.ink(Ink::Red, &text.to_string()),
        );
    }

    /// A line as it is.
    pub fn line(&self, text: &str) {
        let mut screen = self.screen();
        let mut out = std::io::stdout().lock();
        if std::mem::take(&mut screen.progress) {
            let _ = write!(out, "\r\x1b[K");
        }
        // Nobody reading is no reason to stop.
        let _ = writeln!(out, "{text}");
        let _ = out.flush();
    }

    /// Waits for `work`, and shows that it is a wait if it takes a while.
    pub async fn during<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let mut work = std::pin::pin!(work);
        let mut tick = tokio::time::interval(Duration::from_millis(120));
        let mut reminded = start;
        for turn in 0_usize.. {
            tokio::select! {
                done = &mut work => {
                    self.clear_progress();
                    return done;
                }
                _ = tick.tick() => {}
            }
            let waited = start.elapsed();
            if self.inner.terminal && waited > PATIENCE {
                let wheel = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"][turn % 10];
                self.progress(&format!("{wheel} {what} ({} s)", waited.as_secs()));
            } else if !self.inner.terminal && reminded.elapsed() > REMINDER {
                reminded = Instant::now();
                self.say(format!("… {what} ({} s so far)", waited.as_secs()));
            }
        }
        unreachable!("the loop above has no end but its return")
    }

    /// Prints what the API server says, as it says it, until the story ends.
    pub fn follow(&self, mut moments: mpsc::UnboundedReceiver<Moment>) -> AbortOnDropHandle<()> {
        let timeline = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(moment) = moments.recv().await {
                timeline.moment(&moment);
            }
        }))
    }

    fn moment(&self, moment: &Moment) {
        let (mark, text) = match &moment.what {
            What::Scaled { workload, from, to } if is_model(workload) => {
                let (mark, word) = match (from, to) {
                    (0, _) => (self.ink(Ink::Yellow, "▲"), "wakes"),
                    (_, 0) => (self.ink(Ink::Blue, "▼"), "goes to sleep"),
                    _ => (self.ink(Ink::Plain, "↕"), "is scaled"),
                };
                (
                    mark,
                    format!("{} {word}: replicas {from} → {to}", self.name(workload)),
                )
            }
            What::Bound { pod, node, grant } if is_model(pod) => {
                let grant = grant.as_ref().map(|grant| format!(", {}", self.grant(grant)));
                let text = format!(
                    "pod {} is bound to {node}{}",
                    short(pod),
                    grant.unwrap_or_default()
                );
                (self.ink(Ink::Plain, "◆"), text)
            }
            What::Ready { pod } if is_model(pod) => {
                (self.ink(Ink::Plain, "◆"), format!("pod {} is Ready", short(pod)))
            }
            What::PodGone { pod } if is_model(pod) => (
                self.ink(Ink::Faint, "◇"),
                format!("pod {} is gone, its GPU memory is free", short(pod)),
            ),
            What::NodeAdded { node, gpus: true } => (
                self.ink(Ink::Yellow, "■"),
                format!("node {} is here", self.name(node)),
            ),
            What::Fenced { node, on: true } => (
                self.ink(Ink::Blue, "□"),
                format!("node {} is fenced: no pod can be bound to it", self.name(node)),
            ),
            What::Fenced { node, on: false } => (
                self.ink(Ink::Plain, "■"),
                format!("node {} is open again", self.name(node)),
            ),
            What::NodeGone { node } => (
                self.ink(Ink::Blue, "□"),
                format!("node {} is gone", self.name(node)),
            ),
            What::Told {
                by,
                message,
                warning,
                reason,
                object,
                ..
            } if by.starts_with("ebb") => {
                let told = format!("{object} {reason} {message}");
                if std::mem::replace(&mut self.screen().last_told, told.clone()) == told {
                    return;
                }
                let ink = if *warning { Ink::Red } else { Ink::Faint };
                self.line(&format!(
                    "{:>11}{}",
                    "",
                    self.ink(ink, &format!("{reason}: {message}  [{by}]"))
                ));
                return;
            }
            _ => return,
        };
        self.entry(moment.at, mark, &text);
    }

    fn grant(&self, grant: &Grant) -> String {
        let uuids: Vec<&str> = grant.uuids.iter().map(|uuid| short_uuid(uuid)).collect();
        format!(
            "{} with {}, {} of the card",
            uuids.join(" + "),
            gib(grant.bytes),
            grant.share
        )
    }

    fn entry(&self, at: Instant, mark: String, text: &str) {
        let seconds = at.saturating_duration_since(self.inner.start).as_secs_f64();
        let time = self.ink(Ink::Faint, &format!("{seconds:>7.2} s"));
        self.line(&format!("{time} {mark} {text}"));
    }

    fn name(&self, name: &str) -> String {
        self.ink(Ink::Bold, short(name))
    }

    fn progress(&self, text: &str) {
        let mut screen = self.screen();
        let mut out = std::io::stdout().lock();
        let _ = write!(out, "\r\x1b[K          {text}");
        let _ = out.flush();
        screen.progress = true;
    }

    fn clear_progress(&self) {
        let mut screen = self.screen();
        if std::mem::take(&mut screen.progress) {
            let mut out = std::io::stdout().lock();
            let _ = write!(out, "\r\x1b[K");
            let _ = out.flush();
        }
    }

    fn ink(&self, ink: Ink, text: &str) -> String {
        let code = match ink {
            Ink::Plain => return text.to_owned(),
            Ink::Bold => 1,
            Ink::Faint => 2,
            Ink::Red => 31,
            Ink::Green => 32,
            Ink::Yellow => 33,
            Ink::Blue => 34,
        };
        if self.inner.terminal {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn screen(&self) -> MutexGuard<'_, Screen> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

fn is_model(name: &str) -> bool {
    name.starts_with("models/")
}

/// The name without its namespace.
pub fn short(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, name)| name)
}

/// A UUID as far as a person needs it to tell two apart.
pub fn short_uuid(uuid: &str) -> &str {
    uuid.get(..12).unwrap_or(uuid)
}

/// Bytes as GiB.
pub fn gib(bytes: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "two decimals of a GiB are shown")]
    let gib = bytes as f64 / f64::from(1 << 30);
    format!("{gib:.2} GiB")
}

/// A short time as people say it.
pub fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else {
        format!("{seconds:.2} s")
    }
}
