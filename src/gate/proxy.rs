//! One request's life: find its workload by the port it came to, wait if need be, go to a replica, and stream.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout_at};

use super::body::{ReadAhead, Reply};
use super::headers;
use super::hold::{Door, Entered, Held, InFlight, Verdict};
use super::metrics::{Metrics, Outcome, Wait};
use super::problem::Problem;
use super::state::Gate;
use super::upstream::{Answer, Sent};
use crate::api::units;
use crate::api::workload::WorkloadRef;
use crate::plan::hold::Target;

/// What is read of a waiting request's body at most, so that its client's leaving is seen behind it.
const READ_AHEAD: u64 = 256 << 10;
/// Advice to a client that meets a full queue before any load was measured.
const DEFAULT_RETRY: Duration = Duration::from_secs(30);

/// Where a connection came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    /// The gate port.
    pub port: u16,
    /// The client.
    pub peer: SocketAddr,
}

/// Counts a request that its client gives up: then nothing else runs but this drop.
struct Fate {
    metrics: Metrics,
    outcome: Outcome,
}

impl Drop for Fate {
    fn drop(&mut self) {
        self.metrics.request(self.outcome);
    }
}

/// Answers one request.
///
/// # Errors
/// Never: what goes wrong is an answer too.
pub async fn serve(
    gate: Arc<Gate>,
    arrived: Arrived,
    request: Request<Incoming>,
) -> Result<Response<Reply>, Infallible> {
    let mut fate = Fate {
        metrics: gate.metrics.clone(),
        outcome: Outcome::ClientLeft,
    };
    let route = gate
        .table()
        .routes
        .get(&arrived.port)
        .map(|route| (route.target.clone(), route.to.clone()));
    let (target, workload) = match route {
        Some((target, Ok(workload))) => (target, workload),
        Some((_, Err(reason))) => {
            return Ok(own(&mut fate, &Problem::new(Outcome::NoRoute, reason), None));
        }
        None => {
            let problem = Problem::new(Outcome::NoRoute, "no Service uses this gate port any more");
            return Ok(own(&mut fate, &problem, None));
        }
    };
    if request.method() == Method::CONNECT {
        let problem = Problem::new(Outcome::Refused, "CONNECT is not forwarded");
        return Ok(own(&mut fate, &problem, Some(&workload)));
    }
    // RFC 9112 §3.2. Which of them a replica would believe, nobody here can know.
    if request.headers().get_all(HOST).iter().nth(1).is_some() {
        let problem = Problem::new(Outcome::BadRequest, "it has more than one Host field");
        return Ok(own(&mut fate, &problem, Some(&workload)));
    }
    if headers::is_health_check(request.headers()) {
        fate.outcome = Outcome::HealthCheck;
        return Ok(health_check(&gate, &workload, &target, arrived, request).await);
    }
    match forward(&gate, &workload, &target, arrived, request).await {
        Ok(response) => {
            fate.outcome = Outcome::Answered;
            Ok(response)
        }
        Err(problem) => Ok(own(&mut fate, &problem, Some(&workload))),
    }
}

fn own(fate: &mut Fate, problem: &Problem, workload: Option<&WorkloadRef>) -> Response<Reply> {
    fate.outcome = problem.outcome;
    tracing::info!(
        workload = workload.map(ToString::to_string),
        outcome = ?problem.outcome,
        reason = problem.detail,
        "answered in the workload's place"
    );
    problem.response(workload).map(Reply::Own)
}

/// A loaded replica is asked; otherwise the gate says itself that all is well: asleep is no illness.
async fn health_check(
    gate: &Arc<Gate>,
    workload: &WorkloadRef,
    target: &Target,
    arrived: Arrived,
    request: Request<Incoming>,
) -> Response<Reply> {
    let Some(grant) = gate.door(workload).peek(target) else {
        return Response::new(Reply::Own(Full::from(Bytes::from_static(b"asleep\n"))));
    };
    let mut request = request.map(ReadAhead::new);
    headers::to_replica(&mut request, arrived.peer, grant.address);
    match gate.pool.send(grant.address, request).await {
        Sent::Answer(mut response) => {
            headers::to_client(response.headers_mut(), None, None);
            response.map(|answer| Reply::Passed {
                answer,
                in_flight: None,
            })
        }
        Sent::Broken(reason) => Problem::new(Outcome::BadRequest, reason)
            .response(Some(workload))
            .map(Reply::Own),
        Sent::Unsent(_, reason) | Sent::Failed(reason) => Problem::new(Outcome::UpstreamFailed, reason)
            .response(Some(workload))
            .map(Reply::Own),
    }
}

/// A request that has found its door.
struct Visit {
    door: Arc<Door>,
    /// Bytes that it holds here.
    bytes: u64,
    begun: Instant,
    give_up: Instant,
    max_wait: Duration,
    /// What it waited for, if it did, and until how long after it came.
    waited: Option<(Wait, Duration)>,
}

async fn forward(
    gate: &Arc<Gate>,
    workload: &WorkloadRef,
    target: &Target,
    arrived: Arrived,
    mut request: Request<Incoming>,
) -> Result<Response<Reply>, Problem> {
    let max_wait = gate
        .table()
        .workloads
        .get(workload)
        .map_or(DEFAULT_RETRY, |facts| facts.max_wait);
    let begun = Instant::now();
    let client = headers::upgrade(request.headers()).map(|_| hyper::upgrade::on(&mut request));
    let mut visit = Visit {
        door: gate.door(workload),
        bytes: headers::size(&request),
        begun,
        give_up: begun + max_wait,
        max_wait,
        waited: None,
    };
    let mut request = request.map(ReadAhead::new);
    let mut in_flight = match visit.door.arrive(target, units::Bytes(visit.bytes)) {
        Entered::Go(in_flight) => in_flight,
        Entered::Wait(held) => visit.wait(held, request.body_mut()).await?,
        Entered::Full(reason) => {
            return Err(Problem {
                retry_after: Some(visit.door.expected().unwrap_or(DEFAULT_RETRY)),
                ..Problem::new(Outcome::QueueFull, reason)
            });
        }
        Entered::NotWakeable => {
            return Err(Problem::new(
                Outcome::NoRoute,
                "it is at 0 replicas and Ebb does not manage it; scale it up",
            ));
        }
    };
    let mut changed = false;
    loop {
        let Some(address) = in_flight.grant().map(|grant| grant.address) else {
            return Err(Problem::new(Outcome::UpstreamFailed, "no replica was granted"));
        };
        if !std::mem::replace(&mut changed, true) {
            headers::to_replica(&mut request, arrived.peer, address);
        }
        match gate.pool.send(address, request).await {
            Sent::Answer(response) => return Ok(visit.answer(gate, response, client, in_flight)),
            Sent::Broken(reason) => return Err(Problem::new(Outcome::BadRequest, reason)),
            Sent::Failed(reason) => return Err(Problem::new(Outcome::UpstreamFailed, reason)),
            Sent::Unsent(back, reason) => {
                tracing::debug!(workload = %visit.door.workload, reason, "replica not reached; trying on");
                request = back;
                let held = in_flight.again(target, units::Bytes(visit.bytes));
                in_flight = visit.wait(held, request.body_mut()).await?;
            }
        }
    }
}

impl Visit {
    /// Waits for its turn, and reads the request's body ahead meanwhile.
    async fn wait(&mut self, mut held: Held, body: &mut ReadAhead) -> Result<InFlight, Problem> {
        let cold = held.cold || matches!(self.waited, Some((Wait::Cold, _)));
        let mut read_on = true;
        let verdict = timeout_at(self.give_up, async {
            loop {
                if !read_on || body.complete() {
                    return Ok(held.verdict().await);
                }
                tokio::select! {
                    biased;
                    verdict = held.verdict() => return Ok(verdict),
                    read = body.read() => match read {
                        // What the client sent so far is here in any case; only what follows can stay outside.
                        Ok(Some(size)) => {
                            self.bytes += size;
                            read_on = held.grow(units::Bytes(size)) && self.bytes < READ_AHEAD;
                        }
                        Ok(None) => {}
                        Err(error) => return Err(error),
                    },
                }
            }
        });
        let verdict = verdict.await;
        let wait = if cold { Wait::Cold } else { Wait::Busy };
        self.waited = Some((wait, self.begun.elapsed()));
        match verdict {
            Ok(Ok(Verdict::Go(in_flight))) => Ok(in_flight),
            Ok(Ok(Verdict::Failed(problem))) => Err(problem),
            Ok(Err(error)) => Err(Problem::new(
                Outcome::BadRequest,
                format!("its body cannot be read to the end: {error}"),
            )),
            Err(_) => Err(Problem {
                retry_after: self.door.expected().filter(|left| !left.is_zero()),
                ..Problem::new(
                    Outcome::TimedOut,
                    format!(
                        "it was held for {} s, the longest that ebb.dev/max-wait allows, and no replica was free",
                        self.max_wait.as_secs()
                    ),
                )
            }),
        }
    }

    fn answer(
        &self,
        gate: &Gate,
        mut response: Response<Answer>,
        client: Option<OnUpgrade>,
        in_flight: InFlight,
    ) -> Response<Reply> {
        let mut cold_ms = None;
        if let Some((wait, held)) = self.waited {
            gate.metrics.held(wait, held.as_secs_f64());
            cold_ms = (wait == Wait::Cold).then_some(held.as_secs_f64() * 1000.0);
        }
        let mut protocol = None;
        let mut in_flight = Some(in_flight);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            protocol = headers::upgrade(response.headers());
            let replica = hyper::upgrade::on(&mut response);
            response.body_mut().forget_connection();
            if let Some(client) = client {
                gate.tracker.spawn(tunnel(client, replica, in_flight.take()));
            }
        }
        headers::to_client(response.headers_mut(), protocol, cold_ms);
        *response.version_mut() = http::Version::HTTP_11;
        response.map(|answer| Reply::Passed { answer, in_flight })
    }
}

/// After a 101: bytes both ways until both sides have closed. Counts as in flight.
async fn tunnel(client: OnUpgrade, replica: OnUpgrade, in_flight: Option<InFlight>) {
    if let Ok((client, replica)) = tokio::try_join!(client, replica) {
        let (mut client, mut replica) = (TokioIo::new(client), TokioIo::new(replica));
        let _ = tokio::io::copy_bidirectional(&mut client, &mut replica).await;
    }
    drop(in_flight);
}
