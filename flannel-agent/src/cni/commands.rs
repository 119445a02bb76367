//! ADD, DEL, CHECK, STATUS and GC.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    delegate::Delegate,
    delegate_conf::DelegateConf,
    error::Error,
    netns,
    request::{Attachment, Network, Operation, Request},
    state::{FIRST_INTERFACE, Kept, States},
    subnet_file::SubnetFile,
};
use crate::{
    device::observers,
    lock::Lock,
    status::{LeaseState, ReadError, Status},
};

/// Serves a request. What is returned goes to standard output.
///
/// # Errors
/// [`Error`].
pub(super) fn run(request: &Request) -> Result<Vec<u8>, Error> {
    let nothing = |()| Vec::new();
    match (request.operation, &request.attachment, &request.netns) {
        (Operation::Add, Some(attachment), Some(netns)) => add(request, attachment, netns),
        (Operation::Check, Some(attachment), Some(netns)) => check(request, attachment, netns).map(nothing),
        (Operation::Del, Some(attachment), _) => del(request, attachment).map(nothing),
        (Operation::Status, ..) => status(request).map(nothing),
        (Operation::Gc, ..) => gc(request).map(nothing),
        // Such a request is not made.
        (Operation::Add | Operation::Check | Operation::Del, ..) => Err(Error::MissingVariables(Vec::new())),
    }
}

fn add(request: &Request, attachment: &Attachment, netns: &Path) -> Result<Vec<u8>, Error> {
    let Request { network, path, .. } = request;
    let (conf, delegate) = delegation(request)?;
    let takes_stack = network.takes_stack()?;
    // The delegate's DEL, by which a failed ADD is undone, would take an interface away that somebody else made.
    if netns::has_interface(netns, &attachment.ifname)? {
        return Err(Error::InterfaceExists { ifname: attachment.ifname.clone(), netns: netns.to_owned() });
    }
    let states = States(&network.data_dir);
    // What is kept by the container's name is of its first interface, which may well be there.
    let is_others = |kept: &Kept| kept.is_by_container() && attachment.ifname != FIRST_INTERFACE;
    if let Some(kept) = states.load(attachment)?.filter(|kept| !is_others(kept)) {
        // Of a container of that name before a reboot: its address is still reserved.
        detach(network, path, &kept, |delegate, conf| delegate.detach(attachment, conf))?;
        kept.remove()?;
    }
    states.save(attachment, &conf.to_bytes())?;
    let result = delegate.run(Operation::Add, &conf).inspect_err(|_| {
        // Kept where that fails as well: then the runtime's DEL is the next that tries.
        if let (Ok(_), Ok(Some(kept))) = (delegate.run(Operation::Del, &conf), states.load(attachment)) {
            let _kept = kept.remove();
        }
    })?;
    if takes_stack {
        leave_to_stack(&result)?;
    }
    Ok(result)
}

/// Tells the agent, by the host's side of the veth: of the interfaces outside of a sandbox the one next to the container's.
fn leave_to_stack(result: &[u8]) -> Result<(), Error> {
    let result: Value = serde_json::from_slice(result).unwrap_or_default();
    let is_on_host = |interface: &&Value| interface["sandbox"].as_str().is_none_or(str::is_empty);
    let veth = result["interfaces"].as_array().into_iter().flatten().rfind(is_on_host);
    let Some(name) = veth.and_then(|interface| interface["name"].as_str()) else { return Ok(()) };
    let failed = |source| Error::Io { call: "set the alias of", subject: name.to_owned(), source };
    observers::leave_to_stack(name).map_err(failed)
}

fn del(request: &Request, attachment: &Attachment) -> Result<(), Error> {
    let Request { network, path, .. } = request;
    // Nothing to do where nothing is kept: it was detached, or never attached.
    let Some(kept) = States(&network.data_dir).load(attachment)? else { return Ok(()) };
    detach(network, path, &kept, |delegate, conf| {
        let conf = match &network.prev_result {
            Some(result) => conf.with("prevResult", result.clone()),
            None => conf.clone(),
        };
        delegate.run(Operation::Del, &conf).map(drop)
    })?;
    if is_of_another(&kept, attachment, request.netns.as_deref()) { Ok(()) } else { kept.remove() }
}

/// Whether what is kept by the container's name may be of its first interface, when another is detached: that one's DEL
/// came twice, or flannel's plugin attached it, which does not say. The delegate detaches by the interface's name, so it
/// was asked to, and for the first interface the file is needed until that goes.
fn is_of_another(kept: &Kept, attachment: &Attachment, netns: Option<&Path>) -> bool {
    let is_first_gone = || netns.is_some_and(|netns| matches!(netns::has_interface(netns, FIRST_INTERFACE), Ok(false)));
    kept.is_by_container() && attachment.ifname != FIRST_INTERFACE && !is_first_gone()
}

fn check(request: &Request, attachment: &Attachment, netns: &Path) -> Result<(), Error> {
    let Request { network, path, .. } = request;
    let Some(result) = &network.prev_result else {
        return Err(Error::Network("prevResult is required for CHECK".to_owned()));
    };
    let not_attached = || {
        let Attachment { container_id, ifname } = attachment.clone();
        Error::NotAttached { container_id, ifname }
    };
    let kept = States(&network.data_dir).load(attachment)?.ok_or_else(not_attached)?;
    let conf = DelegateConf::parse(&kept.content)?;
    if !netns::has_interface(netns, &attachment.ifname)? {
        return Err(not_attached());
    }
    let subnets = SubnetFile::read(&network.subnet_file)?.subnets;
    let subnets: Vec<_> = subnets.iter().map(ToString::to_string).collect();
    if conf.subnets() != subnets {
        return Err(Error::SubnetMoved { container: conf.subnets().join(","), host: subnets.join(",") });
    }
    let conf = conf.with("prevResult", with_gateways(result.clone()));
    Delegate::find(conf.plugin(), path)?.run(Operation::Check, &conf).map(drop)
}

/// Routes without a gateway lead by that of the container's address, and are in the kernel with it; `bridge` makes them so,
/// and looks in CHECK for routes without one (containernetworking/plugins: pkg/ip/utils_linux.go).
fn with_gateways(mut result: Value) -> Value {
    let of = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let family = |address: &str| address.contains(':');
    let gateways: Vec<_> =
        result["ips"].as_array().into_iter().flatten().filter_map(|address| of(address, "gateway")).collect();
    for route in result.get_mut("routes").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(destination) = of(route, "dst").filter(|_| of(route, "gw").is_none()) else { continue };
        if let Some(gateway) = gateways.iter().find(|gateway| family(gateway) == family(&destination)) {
            route["gw"] = gateway.clone().into();
        }
    }
    result
}

fn status(request: &Request) -> Result<(), Error> {
    let not_ready = |error: Error| Error::NotReady(error.to_string());
    let subnet = SubnetFile::read(&request.network.subnet_file).map_err(|error| not_ready(error.into()))?;
    let (conf, delegate) = delegation(request).map_err(not_ready)?;
    let _takes_stack = request.network.takes_stack()?;
    let run_dir = request.network.subnet_file.parent().unwrap_or(Path::new("/"));
    agent_status(run_dir, &subnet)?;
    delegate.run(Operation::Status, &conf).map(drop)
}

/// How the agent is that wrote `subnet.env`, by the status and the lock beside it. Where neither is there, another
/// daemon wrote it, and nothing is known.
fn agent_status(run_dir: &Path, subnet: &SubnetFile) -> Result<(), Error> {
    let overlays = match Status::read_all(run_dir) {
        Ok(overlays) => overlays,
        Err(ReadError::None(_)) => return Ok(()),
        Err(error @ (ReadError::File { .. } | ReadError::Content { .. })) => {
            return Err(Error::NotReady(error.to_string()));
        }
    };
    let own = overlays.iter().find(|(_, status)| subnet.subnets.contains(&status.lease.subnet.into()));
    let Some((vni, status)) = own else {
        let subnets: Vec<_> = subnet.subnets.iter().map(ToString::to_string).collect();
        return Err(Error::NotReady(format!("no agent of {} has a lease of {}", run_dir.display(), subnets.join(","))));
    };
    if !Lock::is_held(run_dir, *vni).map_err(|error| Error::NotReady(error.to_string()))? {
        return Err(Error::LimitedConnectivity(format!("the agent of flannel.{vni} does not run")));
    }
    match status.lease.state {
        LeaseState::Held | LeaseState::LastKnown => Ok(()),
        LeaseState::Lost | LeaseState::Contested => {
            Err(Error::LimitedConnectivity(format!("the lease of {} is lost", status.lease.subnet)))
        }
    }
}

/// Goes on where something fails, and reports what failed first.
fn gc(request: &Request) -> Result<(), Error> {
    let Request { network, path, .. } = request;
    let Some(valid) = &network.valid_attachments else {
        return Err(Error::Network("cni.dev/valid-attachments is required for GC".to_owned()));
    };
    let mut results = Vec::new();
    let all = States(&network.data_dir).all()?;
    // By its own name; one that has none may be what flannel's plugin kept by the container's.
    let is_named = |valid: &Attachment| all.iter().any(|(of, kept)| of == valid && !kept.is_by_container());
    for (attachment, kept) in &all {
        // What is damaged does not say whose it is; its DEL will come.
        let is_of_network = DelegateConf::parse(&kept.content).is_ok_and(|conf| conf.network() == network.name);
        let is_valid = valid.iter().any(|valid| {
            valid == attachment
                || kept.is_by_container() && valid.container_id == attachment.container_id && !is_named(valid)
        });
        if is_of_network && !is_valid {
            let detached = detach(network, path, kept, |delegate, conf| delegate.detach(attachment, conf));
            results.push(detached.and_then(|()| kept.remove()));
        }
    }
    let valid: Vec<_> = valid
        .iter()
        .map(|Attachment { container_id, ifname }| json!({ "containerID": container_id, "ifname": ifname }))
        .collect();
    results.push(delegation(request).and_then(|(conf, delegate)| {
        delegate.run(Operation::Gc, &conf.with("cni.dev/valid-attachments", Value::Array(valid))).map(drop)
    }));
    results.into_iter().collect()
}

/// What the delegate would be given now, and the delegate.
fn delegation(request: &Request) -> Result<(DelegateConf, Delegate), Error> {
    let subnet = SubnetFile::read(&request.network.subnet_file)?;
    let conf = DelegateConf::generate(&request.network, &subnet)?;
    let delegate = Delegate::find(conf.plugin(), &request.path)?;
    Ok((conf, delegate))
}

/// Has the delegate detach what was kept.
fn detach(
    network: &Network,
    path: &[std::path::PathBuf],
    kept: &Kept,
    run: impl FnOnce(&Delegate, &DelegateConf) -> Result<(), Error>,
) -> Result<(), Error> {
    let conf = DelegateConf::parse(&kept.content).or_else(|error| {
        eprintln!("{} is damaged ({error}); the delegate gets what ADD would give it now", kept.path.display());
        DelegateConf::generate(network, &SubnetFile::read(&network.subnet_file)?)
    })?;
    run(&Delegate::find(conf.plugin(), path)?, &conf)
}
