//! What changes in a message's head on its way through: hop-by-hop fields go, the client's address comes.

use std::net::SocketAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
};
use http::uri::{PathAndQuery, Scheme};
use http::{Request, Uri, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Who asks only whether the workload is well: they neither wake it nor keep it awake.
const HEALTH_CHECKERS: [&str; 4] = ["kube-probe/", "ELB-HealthChecker/", "GoogleHC/", "Prometheus/"];

/// Whether a request comes from a health checker or scraper.
#[must_use]
pub fn is_health_check(headers: &HeaderMap) -> bool {
    headers.get(USER_AGENT).is_some_and(|agent| {
        HEALTH_CHECKERS
            .iter()
            .any(|name| agent.as_bytes().starts_with(name.as_bytes()))
    })
}

/// Bytes that a request's head takes, about.
#[must_use]
pub fn size<B>(request: &Request<B>) -> u64 {
    let fields: usize = request
        .headers()
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    let path = request
        .uri()
        .path_and_query()
        .map_or(0, |path| path.as_str().len());
    (fields + path + 16) as u64
}

/// The protocol that a request wants to go on with, if it asks for one.
#[must_use]
pub fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| asked).cloned()
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Takes out what belongs to one connection only (RFC 9110 §7.6.1). `Trailer` stays: it describes the message.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| token.parse().ok())
        .collect();
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    // Both together are how requests are smuggled; the transfer coding is the one that counts.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    for name in named.iter().chain(&[
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ]) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Makes a client's request one for a replica.
pub fn to_replica<B>(request: &mut Request<B>, peer: SocketAddr, address: SocketAddr) {
    let upgrade = upgrade(request.headers());
    let host = host(request);
    let headers = request.headers_mut();
    strip(headers);
    // The gate has read on, so the client has its 100 from here.
    headers.remove(EXPECT);
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
    forwarded(headers, peer, host.as_ref());
    if request.version() == Version::HTTP_2 {
        absolute(request, address);
    } else {
        if let (false, Ok(value)) = (
            request.headers().contains_key(HOST),
            HeaderValue::try_from(address.to_string()),
        ) {
            request.headers_mut().insert(HOST, value);
        }
        let path = path(request.uri());
        *request.uri_mut() = Uri::from(path);
        *request.version_mut() = Version::HTTP_11;
    }
}

fn host<B>(request: &Request<B>) -> Option<HeaderValue> {
    request.headers().get(HOST).cloned().or_else(|| {
        let authority = request.uri().authority()?;
        HeaderValue::try_from(authority.as_str()).ok()
    })
}

fn path(uri: &Uri) -> PathAndQuery {
    uri.path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
}

/// HTTP/2 names scheme and authority in the request itself.
fn absolute<B>(request: &mut Request<B>, address: SocketAddr) {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = request
        .uri()
        .authority()
        .cloned()
        .or_else(|| address.to_string().parse().ok());
    parts.path_and_query = Some(path(request.uri()));
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

fn forwarded(headers: &mut HeaderMap, peer: SocketAddr, host: Option<&HeaderValue>) {
    let ip = peer.ip().to_canonical();
    append(headers, X_FORWARDED_FOR, &ip.to_string());
    let mut element = if ip.is_ipv6() {
        format!("for=\"[{ip}]\"")
    } else {
        format!("for={ip}")
    };
    if let Some(host) = host.and_then(|host| host.to_str().ok())
        && !host.contains(['"', '\\'])
    {
        element.push_str(&format!(";host=\"{host}\""));
    }
    element.push_str(";proto=http");
    append(headers, FORWARDED, &element);
    if !headers.contains_key(&X_FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    if let (Some(host), false) = (host, headers.contains_key(&X_FORWARDED_HOST)) {
        headers.insert(X_FORWARDED_HOST, host.clone());
    }
}

/// Appends to a list field, as one line: not every server reads several.
fn append(headers: &mut HeaderMap, name: HeaderName, element: &str) {
    let before: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    let mut line = before.join(&b", "[..]);
    if !line.is_empty() {
        line.extend_from_slice(b", ");
    }
    line.extend_from_slice(element.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&line) {
        headers.insert(name, value);
    }
}

/// Makes a replica's answer one for the client. `protocol`: what both go on with after a 101.
pub fn to_client(headers: &mut HeaderMap, protocol: Option<HeaderValue>, cold_ms: Option<f64>) {
    strip(headers);
    headers.remove(TE);
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
    if let Some(ms) = cold_ms
        && let Ok(value) = HeaderValue::try_from(format!("ebb;desc=\"cold\";dur={ms:.1}"))
    {
        headers.append(SERVER_TIMING, value);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(fields: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::get("/v1/models?x=1");
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn passed(fields: &[(&str, &str)]) -> HeaderMap {
        let mut request = request(fields);
        to_replica(
            &mut request,
            "10.0.0.9:4000".parse().unwrap(),
            "10.0.0.1:80".parse().unwrap(),
        );
        request.headers().clone()
    }

    #[test]
    fn hop_by_hop_fields_stay_behind() {
        let headers = passed(&[
            ("host", "model.example"),
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("expect", "100-continue"),
            ("authorization", "Bearer x"),
        ]);
        for gone in ["connection", "x-private", "keep-alive", "expect"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers["host"], "model.example");
        assert_eq!(headers["authorization"], "Bearer x");
    }

    #[test]
    fn the_client_is_named() {
        let headers = passed(&[
            ("host", "m"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "5.6.7.8"),
        ]);
        assert_eq!(headers["x-forwarded-for"], "1.2.3.4, 5.6.7.8, 10.0.0.9");
        assert_eq!(headers["forwarded"], "for=10.0.0.9;host=\"m\";proto=http");
        assert_eq!(headers["x-forwarded-host"], "m");
        assert_eq!(headers["x-forwarded-proto"], "http");
    }

    #[test]
    fn adversarial_length_beside_a_transfer_coding_goes() {
        let headers = passed(&[
            ("host", "m"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
        ]);
        assert!(!headers.contains_key("content-length"));
        assert!(!headers.contains_key("transfer-encoding"));
    }

    #[test]
    fn an_upgrade_passes_and_other_uses_of_the_field_do_not() {
        let headers = passed(&[("host", "m"), ("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(headers["upgrade"], "websocket");
        assert_eq!(headers["connection"], "upgrade");
        let headers = passed(&[("host", "m"), ("upgrade", "websocket")]);
        assert!(!headers.contains_key("upgrade"));
    }

    #[test]
    fn an_old_client_without_host_gets_one() {
        assert_eq!(passed(&[])["host"], "10.0.0.1:80");
    }

    #[test]
    fn health_checkers_are_known_by_their_name() {
        for (agent, is) in [
            ("kube-probe/1.36", true),
            ("Prometheus/3.0", true),
            ("ELB-HealthChecker/2.0", true),
            ("GoogleHC/1.0", true),
            ("curl/8.5 kube-probe/", false),
        ] {
            assert_eq!(
                is_health_check(request(&[("user-agent", agent)]).headers()),
                is,
                "{agent}"
            );
        }
    }
}
