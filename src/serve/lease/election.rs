//! The election itself: what was seen of the Lease and when, on this machine's own clock, in; what to do, out.
//!
//! Times of other machines are never compared with ours. A candidate waits until the record has not changed for the
//! Lease's duration *as it watched*; a leader counts its own time from *before* it sent the write that renewed. As
//! others cannot have seen that write earlier, the leader's time is up first:
//!
//! ```text
//! leader    │ sends renewal ──────── deadline 3.5 s: stops leading by itself
//! API       │    └─ written
//! candidate │         └─ sees it ──── 3.5 s: vacant ── duration 5 s: may take it
//! ```
//!
//! Between the two the candidate cannot lead yet, but knows that nobody else does, if that record stands until it is
//! taken over: a [`Vacancy`].

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Times of an election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// A record that has not changed for this long may be taken over.
    pub duration: Duration,
    /// A leader that could not renew for this long stops leading.
    pub deadline: Duration,
    /// Pause between renewals.
    pub renew: Duration,
    /// Pause between looks of one who does not lead.
    pub poll: Duration,
    /// Longest wait for one answer of the API server.
    pub request: Duration,
}

/// Fail-over within 5.5 s of a crash, and at once after a clean stop. Kubernetes' own 15 s would leave requests to a
/// sleeping model waiting that long, since only the leader places pods; a renewal every 1.5 s is two small
/// requests more per second for the API server, and two may fail before leadership is given up.
impl Default for Times {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(5),
            deadline: Duration::from_millis(3500),
            renew: Duration::from_millis(1500),
            poll: Duration::from_millis(500),
            request: Duration::from_millis(1200),
        }
    }
}

/// Who holds the Lease: `<pod name>_<pod address>`, so that any replica can find the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The pod's name.
    pub pod: String,
    /// The pod's address.
    pub ip: IpAddr,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}", self.pod, self.ip)
    }
}

impl std::str::FromStr for Holder {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (pod, ip) = text.rsplit_once('_').ok_or(())?;
        Ok(Self {
            pod: pod.to_owned(),
            ip: ip.parse().map_err(|_| ())?,
        })
    }
}

/// What stands in the Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// Changes with every renewal. Only ever compared for being the same.
    pub renewed: String,
    /// Grows with every change of leadership: the term.
    pub transitions: u64,
}

/// What to do next about the Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write oneself in, if it still stands as seen.
    Write {
        /// The term that begins or goes on.
        term: u64,
    },
    /// Leave it.
    Wait,
}

/// From some moment on nobody decides, if the record that was seen stands until it is taken over: whoever wrote it has
/// stopped by itself. Vacancies after the same record are the same one, whichever candidate waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vacancy {
    /// Text that no other vacancy has. Only what was written after [`Vacancy::from`] may carry it.
    pub mark: String,
    /// When it begins, on this machine's clock.
    pub from: Instant,
}

/// What this process knows.
#[derive(Clone, Debug)]
pub struct Election {
    me: String,
    times: Times,
    seen: Option<(Record, Instant)>,
    leading: Option<Led>,
    /// What the last term began with.
    taken: Option<Vacancy>,
}

#[derive(Clone, Copy, Debug)]
struct Led {
    term: u64,
    until: Instant,
}

impl Election {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(me: &Holder, times: Times) -> Self {
        Self {
            me: me.to_string(),
            times,
            seen: None,
            leading: None,
            taken: None,
        }
    }

    /// The term that this process leads, and until when it does without another renewal.
    #[must_use]
    pub fn leading(&self, now: Instant) -> Option<(u64, Instant)> {
        self.leading
            .filter(|led| now < led.until)
            .map(|led| (led.term, led.until))
    }

    /// Who else holds it, as last seen.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        let (record, _) = self.seen.as_ref()?;
        (record.holder != self.me).then(|| record.holder.parse().ok())?
    }

    /// The vacancy that begins if the record is not renewed; while leading, the one that was taken over.
    #[must_use]
    pub fn vacancy(&self) -> Option<Vacancy> {
        if self.leading.is_some() {
            return self.taken.clone();
        }
        let (record, since) = self.seen.as_ref()?;
        // Nobody's may be taken at once, and of our own name nothing is known but from before a restart.
        (!record.holder.is_empty() && record.holder != self.me).then(|| Vacancy {
            mark: format!("{} after {}", record.transitions + 1, record.renewed),
            from: *since + self.times.deadline,
        })
    }

    /// The Lease was read (`None`: there is none), and the answer arrived at `now`.
    pub fn observe(&mut self, record: Option<Record>, now: Instant) -> Step {
        let record = record.unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == record => *since,
            _ => now,
        };
        let free = record.holder.is_empty() || record.holder == self.me;
        let transitions = record.transitions;
        let mine = record.holder == self.me;
        self.seen = Some((record, since));
        if !free && now.duration_since(since) < self.times.duration {
            self.leading = None;
            return Step::Wait;
        }
        let term = match self.leading(now) {
            Some((term, _)) if mine && term == transitions => term,
            // Also after a time of not leading under the same name: whoever relied on the old term must notice.
            _ => transitions + 1,
        };
        Step::Write { term }
    }

    /// The write of [`Step::Write`] was answered with success. It was sent at `sent`.
    pub fn written(&mut self, record: Record, sent: Instant, now: Instant) {
        if self.leading.is_none_or(|led| led.term != record.transitions) {
            self.leading = None;
            self.taken = self.vacancy();
        }
        self.leading = Some(Led {
            term: record.transitions,
            until: sent + self.times.deadline,
        });
        self.seen = Some((record, now));
    }

    /// Leading ends now, by our own will.
    pub fn resign(&mut self) {
        self.leading = None;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn holder(n: usize) -> Holder {
        format!("ebb-controller-{n}_10.77.0.{}", n + 1).parse().unwrap()
    }

    #[test]
    fn holders_read_back() {
        for text in ["ebb-controller-5d_10.77.1.2", "a_fd00::1"] {
            assert_eq!(text.parse::<Holder>().unwrap().to_string(), text);
        }
        assert!("ebb-controller".parse::<Holder>().is_err());
        assert!("other_thing".parse::<Holder>().is_err());
    }

    #[test]
    fn a_record_that_moves_is_left_alone_for_ever() {
        let mut election = Election::new(&holder(0), Times::default());
        let start = Instant::now();
        for second in 0..100u64 {
            let record = Record {
                holder: holder(1).to_string(),
                renewed: second.to_string(),
                transitions: 1,
            };
            let now = start + Duration::from_secs(second * 4);
            assert_eq!(election.observe(Some(record), now), Step::Wait);
        }
        assert_eq!(election.holder(), Some(holder(1)));
    }

    fn of(n: usize, renewed: u64, transitions: u64) -> Record {
        Record {
            holder: holder(n).to_string(),
            renewed: renewed.to_string(),
            transitions,
        }
    }

    #[test]
    fn a_vacancy_is_taken_over_only_after_the_very_record_it_began_with() {
        let (times, start) = (Times::default(), Instant::now());
        let mut election = Election::new(&holder(0), times);
        assert_eq!(election.vacancy(), None);
        election.observe(Some(of(1, 0, 4)), start);
        let first = election.vacancy().unwrap();
        assert_eq!(first.from, start + times.deadline);
        // Seen again, it still began when it was seen first.
        election.observe(Some(of(1, 0, 4)), start + times.poll);
        assert_eq!(election.vacancy(), Some(first.clone()));
        // Renewed at the last moment: nothing that was done before counts.
        let renewed = start + times.deadline;
        election.observe(Some(of(1, 1, 4)), renewed);
        let second = election.vacancy().unwrap();
        assert_ne!(second.mark, first.mark);
        assert_eq!(second.from, renewed + times.deadline);
        let taken = renewed + times.duration;
        assert_eq!(
            election.observe(Some(of(1, 1, 4)), taken),
            Step::Write { term: 5 }
        );
        election.written(of(0, 2, 5), taken, taken);
        assert_eq!(election.vacancy(), Some(second.clone()));
        // The term goes on with what it began with; a term after our own has none.
        election.written(of(0, 3, 5), taken, taken);
        assert_eq!(election.vacancy(), Some(second));
        let late = taken + times.duration;
        assert_eq!(election.observe(Some(of(0, 3, 5)), late), Step::Write { term: 6 });
        election.written(of(0, 4, 6), late, late);
        assert_eq!(election.vacancy(), None);
    }

    #[test]
    fn a_lease_that_was_given_back_is_taken_without_a_vacancy() {
        let (mut election, now) = (Election::new(&holder(0), Times::default()), Instant::now());
        let free = Record {
            holder: String::new(),
            ..of(1, 0, 4)
        };
        assert_eq!(election.observe(Some(free), now), Step::Write { term: 5 });
        assert_eq!(election.vacancy(), None);
        election.written(of(0, 1, 5), now, now);
        assert_eq!(election.vacancy(), None);
    }

    /// What can happen between two candidates and the API server, in any order.
    #[derive(Clone, Debug)]
    enum Event {
        /// Time passes, in milliseconds.
        Pass(u64),
        /// The candidate reads, and the answer arrives at once.
        Read(usize),
        /// The candidate sends the write that it last decided on; it is kept under way.
        Send(usize),
        /// The API server takes the write under way.
        Arrive(usize),
        /// The answer reaches the candidate.
        Answer(usize),
        /// The candidate restarts and has forgotten everything.
        Restart(usize),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let one = prop_oneof![
            (0u64..3000).prop_map(Event::Pass),
            (0usize..3).prop_map(Event::Read),
            (0usize..3).prop_map(Event::Send),
            (0usize..3).prop_map(Event::Arrive),
            (0usize..3).prop_map(Event::Answer),
            (0usize..3).prop_map(Event::Restart),
        ];
        proptest::collection::vec(one, 1..300)
    }

    #[derive(Clone, Default)]
    struct Candidate {
        decided: Option<(u64, u64)>,
        sent: Option<(u64, u64, Instant)>,
        accepted: Option<(Record, Instant)>,
    }

    proptest! {
        /// However reads, writes and answers are ordered and delayed, no two lead at the same time, no term is led by
        /// two, and whoever took over a vacancy is the first to lead since it began for any candidate.
        #[test]
        fn race_never_two_leaders(events in events()) {
            let times = Times::default();
            let mut now = Instant::now();
            let mut elections: Vec<_> = (0..3).map(|n| Election::new(&holder(n), times)).collect();
            let mut candidates = vec![Candidate::default(); 3];
            let (mut version, mut lease, mut renewals) = (0u64, None::<Record>, 0u64);
            let mut led: std::collections::BTreeMap<u64, usize> = std::collections::BTreeMap::new();
            let mut last_led: Option<(Instant, u64)> = None;
            let mut begun: std::collections::BTreeMap<String, Instant> = std::collections::BTreeMap::new();
            for event in events {
                match event {
                    Event::Pass(millis) => now += Duration::from_millis(millis),
                    Event::Read(n) => {
                        candidates[n].decided = match elections[n].observe(lease.clone(), now) {
                            Step::Write { term } => Some((term, version)),
                            Step::Wait => None,
                        };
                    }
                    Event::Send(n) => {
                        if let Some((term, at)) = candidates[n].decided.take() {
                            candidates[n].sent = Some((term, at, now));
                        }
                    }
                    Event::Arrive(n) => {
                        if let Some((term, at, sent)) = candidates[n].sent.take()
                            && at == version
                        {
                            version += 1;
                            renewals += 1;
                            let record = Record {
                                holder: holder(n).to_string(),
                                renewed: renewals.to_string(),
                                transitions: term,
                            };
                            lease = Some(record.clone());
                            candidates[n].accepted = Some((record, sent));
                        }
                    }
                    Event::Answer(n) => {
                        if let Some((record, sent)) = candidates[n].accepted.take() {
                            elections[n].written(record, sent, now);
                        }
                    }
                    Event::Restart(n) => {
                        elections[n] = Election::new(&holder(n), times);
                        candidates[n] = Candidate::default();
                    }
                }
                let leaders: Vec<_> = elections
                    .iter()
                    .enumerate()
                    .filter_map(|(n, e)| e.leading(now).map(|(term, _)| (n, term)))
                    .collect();
                prop_assert!(leaders.len() <= 1, "{leaders:?}");
                for vacancy in elections.iter().filter_map(Election::vacancy) {
                    let first = begun.entry(vacancy.mark).or_insert(vacancy.from);
                    *first = vacancy.from.min(*first);
                }
                for (n, term) in leaders {
                    prop_assert_eq!(*led.entry(term).or_insert(n), n);
                    if let (Some(taken), Some((last, of))) = (elections[n].vacancy(), last_led)
                        && of != term
                    {
                        prop_assert!(last < begun[&taken.mark], "term {of} was led within the vacancy");
                    }
                    last_led = Some((now, term));
                }
            }
        }
    }
}
