//! Bodies on their way through: a request's, of which the first part may be read while it waits, and an answer's,
//! which counts as in flight until it ends.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;

use super::hold::InFlight;
use super::upstream::Answer;

/// A request's body. Nothing is read of it until somebody asks: the client feels the replica's pace.
pub struct ReadAhead {
    ready: VecDeque<Frame<Bytes>>,
    rest: Incoming,
    ended: bool,
}

impl ReadAhead {
    /// A body of which nothing was read yet.
    #[must_use]
    pub fn new(rest: Incoming) -> Self {
        Self {
            ready: VecDeque::new(),
            ended: rest.is_end_stream(),
            rest,
        }
    }

    /// Whether all of it is here.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.ended
    }

    /// Reads one more frame ahead and returns its size; `None` at the end.
    ///
    /// Why at all: a client's leaving can only be seen behind the last byte it sent.
    ///
    /// # Errors
    /// When the client breaks off.
    pub async fn read(&mut self) -> Result<Option<u64>, hyper::Error> {
        match self.rest.frame().await {
            None => {
                self.ended = true;
                Ok(None)
            }
            Some(Err(error)) => Err(error),
            Some(Ok(frame)) => {
                let size = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.ready.push_back(frame);
                self.ended = self.rest.is_end_stream();
                Ok(Some(size))
            }
        }
    }
}

impl Body for ReadAhead {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(frame) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_empty() && (self.ended || self.rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let here: u64 = self
            .ready
            .iter()
            .filter_map(Frame::data_ref)
            .map(|data| data.len() as u64)
            .sum();
        let rest = if self.ended {
            SizeHint::with_exact(0)
        } else {
            self.rest.size_hint()
        };
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(here));
        }
        hint.set_lower(rest.lower().saturating_add(here));
        hint
    }
}

/// What goes back to the client.
pub enum Reply {
    /// A replica's answer.
    Passed {
        /// The answer.
        answer: Answer,
        /// Counts as in flight until the answer ends. `None` for health checks.
        in_flight: Option<InFlight>,
    },
    /// The gate's own.
    Own(Full<Bytes>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Reply::Passed { answer, in_flight } => {
                let polled = Pin::new(answer).poll_frame(cx);
                if let Poll::Ready(None | Some(Err(_))) = polled {
                    *in_flight = None;
                }
                polled
            }
            Reply::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Passed { answer, .. } => answer.is_end_stream(),
            Reply::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Passed { answer, .. } => answer.size_hint(),
            Reply::Own(body) => body.size_hint(),
        }
    }
}
