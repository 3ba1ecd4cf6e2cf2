//! A pod's volumes: folders on the node, filled from the API server and kept up to date.

use super::atomic_dir::{self, Payload};
use super::exec::Mount;
use super::expand::expand;
use super::fields::{self, NodeFacts};
use super::lock;
use super::machine::Machine;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccount,
    ServiceAccountTokenProjection, Volume,
};
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const DEFAULT_MODE: i32 = 0o644;

/// What could not be set up, in the kubelet's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?} : {reason}")]
pub struct VolumeError {
    volume: String,
    reason: String,
}

/// Audience and life in seconds of a token.
type TokenKind = (Option<String>, i64);

/// The volumes of one pod.
pub struct Volumes {
    client: Client,
    dir: PathBuf,
    facts: NodeFacts,
    node: Arc<Machine>,
    tokens: Mutex<HashMap<TokenKind, (String, Instant)>>,
    written: Mutex<HashMap<String, Payload>>,
}

impl Volumes {
    /// Volumes in `dir`, nothing set up yet.
    pub fn new(client: Client, dir: PathBuf, facts: NodeFacts, node: Arc<Machine>) -> Self {
        Self {
            client,
            dir,
            facts,
            node,
            tokens: Mutex::default(),
            written: Mutex::default(),
        }
    }

    /// Sets up all volumes of `pod`, or brings them up to date.
    ///
    /// # Errors
    /// The first volume that is not there; try again later.
    pub async fn set_up(&self, pod: &Pod) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let each = volumes.map(|volume| async move {
            let path = self.one(pod, volume).await;
            let path = path.map_err(|reason| VolumeError {
                volume: volume.name.clone(),
                reason,
            })?;
            Ok((volume.name.clone(), path))
        });
        futures::future::try_join_all(each)
            .await
            .map(|all| all.into_iter().collect())
    }

    async fn one(&self, pod: &Pod, volume: &Volume) -> Result<PathBuf, String> {
        let dir = self.dir.join(&volume.name);
        if volume.empty_dir.is_some() {
            std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
            return Ok(dir);
        }
        if let Some(host) = &volume.host_path {
            let path = self.node.host_path(&host.path);
            return host_path(path, host.type_.as_deref().unwrap_or(""));
        }
        let payload = self.payload(pod, volume).await?;
        if lock(&self.written).get(&volume.name) != Some(&payload) {
            let (to, files) = (dir.clone(), payload.clone());
            let written = tokio::task::spawn_blocking(move || atomic_dir::write(&to, &files)).await;
            written.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
            lock(&self.written).insert(volume.name.clone(), payload);
        }
        Ok(dir)
    }

    async fn payload(&self, pod: &Pod, volume: &Volume) -> Result<Payload, String> {
        let mut payload = Payload::new();
        if let Some(source) = &volume.secret {
            let name = source.secret_name.as_deref().unwrap_or("");
            let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
            self.secret(
                pod,
                name,
                source.items.as_deref(),
                source.optional,
                mode,
                &mut payload,
            )
            .await?;
        } else if let Some(source) = &volume.config_map {
            let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
            self.config_map(
                pod,
                &source.name,
                source.items.as_deref(),
                source.optional,
                mode,
                &mut payload,
            )
            .await?;
        } else if let Some(source) = &volume.downward_api {
            let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
            self.downward(pod, source.items.as_deref(), mode, &mut payload)?;
        } else if let Some(projected) = &volume.projected {
            let mode = projected.default_mode.unwrap_or(DEFAULT_MODE);
            for source in projected.sources.iter().flatten() {
                if let Some(s) = &source.secret {
                    self.secret(pod, &s.name, s.items.as_deref(), s.optional, mode, &mut payload)
                        .await?;
                } else if let Some(s) = &source.config_map {
                    self.config_map(pod, &s.name, s.items.as_deref(), s.optional, mode, &mut payload)
                        .await?;
                } else if let Some(s) = &source.downward_api {
                    self.downward(pod, s.items.as_deref(), mode, &mut payload)?;
                } else if let Some(s) = &source.service_account_token {
                    let token = self.token(pod, s).await?;
                    payload.insert(s.path.clone(), (token.into_bytes(), permissions(mode)));
                } else {
                    return Err("this kind of projection is not supported by this node".to_owned());
                }
            }
        } else {
            return Err("this kind of volume is not supported by this node".to_owned());
        }
        Ok(payload)
    }

    async fn secret(
        &self,
        pod: &Pod,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        mode: i32,
        payload: &mut Payload,
    ) -> Result<(), String> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let found = api.get_opt(name).await.map_err(|e| e.to_string())?;
        let data = found.map(|secret| {
            let data = secret.data.unwrap_or_default().into_iter();
            data.map(|(key, value)| (key, value.0)).collect()
        });
        project(
            data,
            &format!("secret {name:?}"),
            items,
            optional == Some(true),
            mode,
            payload,
        )
    }

    async fn config_map(
        &self,
        pod: &Pod,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        mode: i32,
        payload: &mut Payload,
    ) -> Result<(), String> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let found = api.get_opt(name).await.map_err(|e| e.to_string())?;
        let data = found.map(|map| {
            let texts = map
                .data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.into_bytes()));
            let blobs = map
                .binary_data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.0));
            texts.chain(blobs).collect()
        });
        project(
            data,
            &format!("configmap {name:?}"),
            items,
            optional == Some(true),
            mode,
            payload,
        )
    }

    fn downward(
        &self,
        pod: &Pod,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: i32,
        payload: &mut Payload,
    ) -> Result<(), String> {
        for item in items.unwrap_or_default() {
            let value = if let Some(selector) = &item.field_ref {
                fields::field(pod, &self.facts, selector)?
            } else if let Some(selector) = &item.resource_field_ref {
                fields::resource(pod, &self.facts, None, selector)?
            } else {
                continue;
            };
            payload.insert(
                item.path.clone(),
                (value.into_bytes(), permissions(item.mode.unwrap_or(mode))),
            );
        }
        Ok(())
    }

    /// A token bound to the pod, the same one until four fifths of its life are over.
    async fn token(&self, pod: &Pod, wanted: &ServiceAccountTokenProjection) -> Result<String, String> {
        let seconds = wanted.expiration_seconds.unwrap_or(3600);
        let key = (wanted.audience.clone(), seconds);
        let cached = lock(&self.tokens).get(&key).cloned();
        if let Some((token, until)) = cached
            && Instant::now() < until
        {
            return Ok(token);
        }
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone());
        let account = account
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".to_owned());
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: wanted
                    .audience
                    .clone()
                    .into_iter()
                    .filter(|a| !a.is_empty())
                    .collect(),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(pod.name_any()),
                    uid: pod.uid(),
                }),
            },
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> =
            Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let answer = api
            .create_token_request(&account, &PostParams::default(), &request)
            .await
            .map_err(|error| format!("failed to fetch token: {error}"))?;
        let token = answer
            .status
            .ok_or("failed to fetch token: the answer has none")?
            .token;
        // A cluster may cap the life it grants; asking again in time costs little.
        let life = Duration::from_secs(u64::try_from(seconds.clamp(600, 86_400)).unwrap_or(3600));
        lock(&self.tokens).insert(key, (token.clone(), Instant::now() + life * 4 / 5));
        Ok(token)
    }
}

/// The permission bits of an API mode, which is signed.
fn permissions(mode: i32) -> u32 {
    u32::try_from(mode & 0o777).unwrap_or(0o644)
}

fn project(
    data: Option<BTreeMap<String, Vec<u8>>>,
    what: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
    mode: i32,
    payload: &mut Payload,
) -> Result<(), String> {
    let data = match data {
        Some(data) => data,
        None if optional => return Ok(()),
        None => return Err(format!("{what} not found")),
    };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        payload.extend(
            data.into_iter()
                .map(|(key, value)| (key, (value, permissions(mode)))),
        );
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(value) => {
                let mode = permissions(item.mode.unwrap_or(mode));
                payload.insert(item.path.clone(), (value.clone(), mode));
            }
            None if optional => {}
            None => return Err(format!("references non-existent {what} key: {}", item.key)),
        }
    }
    Ok(())
}

fn host_path(path: PathBuf, kind: &str) -> Result<PathBuf, String> {
    let wrong = |what: &str| {
        Err(format!(
            "hostPath type check failed: {} is not a {what}",
            path.display()
        ))
    };
    match kind {
        "DirectoryOrCreate" => std::fs::create_dir_all(&path).map_err(|e| e.to_string())?,
        "FileOrCreate" if !path.exists() => {
            std::fs::write(&path, b"").map_err(|e| e.to_string())?;
        }
        "Directory" if !path.is_dir() => return wrong("directory"),
        "File" if !path.is_file() => return wrong("file"),
        _ if !path.exists() => return wrong("path on this node"),
        _ => {}
    }
    Ok(path)
}

/// The mounts of `container`.
///
/// # Errors
/// Names the mount that cannot be made.
pub fn mounts(
    container: &Container,
    volumes: &BTreeMap<String, PathBuf>,
    env: &BTreeMap<String, String>,
) -> Result<Vec<Mount>, String> {
    let mut mounts = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let volume = volumes
            .get(&mount.name)
            .ok_or_else(|| format!("volume {:?} is not set up", mount.name))?;
        let sub_path = match (&mount.sub_path, &mount.sub_path_expr) {
            (Some(path), _) if !path.is_empty() => Some(path.clone()),
            (_, Some(text)) if !text.is_empty() => {
                Some(expand(text, |name| env.get(name).map(String::as_str)))
            }
            _ => None,
        };
        let source = match sub_path {
            None => volume.clone(),
            Some(path) => sub_path_source(volume, &path)?,
        };
        mounts.push(Mount {
            source,
            target: PathBuf::from(&mount.mount_path),
            read_only: mount.read_only == Some(true),
        });
    }
    Ok(mounts)
}

/// Adds a mount for each of `paths` that the others would hide.
///
/// Programs of this machine stand for images, so a volume at `/tmp` must not take away what lies below `/tmp` here.
pub fn keep_visible(paths: &[PathBuf], mounts: &mut Vec<Mount>) {
    for path in paths {
        let covering = mounts
            .iter()
            .filter_map(|mount| Some((mount, path.strip_prefix(&mount.target).ok()?)));
        let deepest = covering.max_by_key(|(mount, _)| mount.target.components().count());
        if deepest.is_some_and(|(mount, rest)| !mount.source.join(rest).exists()) {
            mounts.push(Mount {
                source: path.clone(),
                target: path.clone(),
                read_only: false,
            });
        }
    }
}

fn sub_path_source(volume: &Path, path: &str) -> Result<PathBuf, String> {
    let source = volume.join(path);
    if Path::new(path).is_absolute() || path.split('/').any(|part| part == "..") {
        return Err(format!("subPath {path:?} must stay inside its volume"));
    }
    if !source.exists() {
        // As the kubelet does: a missing subPath becomes a folder.
        std::fs::create_dir_all(&source).map_err(|e| format!("subPath {path:?}: {e}"))?;
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn data() -> Option<BTreeMap<String, Vec<u8>>> {
        Some([("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())].into())
    }

    #[test]
    fn items_choose_and_rename_keys() {
        let mut payload = Payload::new();
        let items = [KeyToPath {
            key: "a".into(),
            path: "x/y".into(),
            mode: Some(0o400),
        }];
        project(data(), "secret \"s\"", Some(&items), false, 0o644, &mut payload).unwrap();
        assert_eq!(
            payload,
            Payload::from([("x/y".to_owned(), (b"1".to_vec(), 0o400))])
        );
        let wrong = [KeyToPath {
            key: "z".into(),
            ..KeyToPath::default()
        }];
        assert!(project(data(), "secret \"s\"", Some(&wrong), false, 0o644, &mut payload).is_err());
    }

    #[test]
    fn a_missing_object_is_told_unless_optional() {
        let mut payload = Payload::new();
        let missing = project(None, "secret \"s\"", None, false, 0o644, &mut payload);
        assert_eq!(missing.unwrap_err(), "secret \"s\" not found");
        project(None, "secret \"s\"", None, true, 0o644, &mut payload).unwrap();
        assert!(payload.is_empty());
    }

    #[test]
    fn what_a_volume_would_hide_stays_visible() {
        let dir = tempfile::tempdir().unwrap();
        let mount = |source: &Path, target: &str| Mount {
            source: source.to_owned(),
            target: target.into(),
            read_only: false,
        };
        let program = PathBuf::from("/tmp/x/program");
        let mut mounts = vec![mount(dir.path(), "/tmp"), mount(dir.path(), "/var")];
        keep_visible(std::slice::from_ref(&program), &mut mounts);
        assert_eq!(mounts.last().unwrap().target, program);
        // A host path that shows the same is no obstacle.
        std::fs::create_dir_all(dir.path().join("x/program")).unwrap();
        let mut mounts = vec![mount(dir.path(), "/tmp")];
        keep_visible(&[program], &mut mounts);
        assert_eq!(mounts.len(), 1);
    }

    #[test]
    fn sub_paths_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sub_path_source(dir.path(), "../x").is_err());
        assert!(sub_path_source(dir.path(), "/x").is_err());
        assert!(sub_path_source(dir.path(), "new/folder").unwrap().is_dir());
    }
}
