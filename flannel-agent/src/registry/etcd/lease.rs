//! Taking, keeping and losing this host's own lease. Every write is a transaction on the key's being what was read, so
//! that a host which slept can't take back what another has by then.
//!
//! # Two hosts with one address
//!
//! As in flannel, the lease that names a host's PublicIP is its own, so a cloned machine, or one with the same
//! `--public-ip`, would take the lease of a host that lives, and the peers would follow whoever wrote last. Nothing in the
//! value can tell them apart, since flannel's bytes are fixed. So a host asks first:
//!
//! * **Claim.** Whoever finds a lease with its own address but not with the MAC of its own device writes the value that is
//!   there again, with the etcd lease that is there, on condition that nobody has written since. That changes nothing but
//!   the key's revision and version.
//! * **Answer.** The agent that holds the lease sees by its watch that the version is one more than it knows, and writes
//!   the same twice.
//! * **Outcome.** Where the revision has changed within [`ANSWER_TIME`], somebody lives: the claimant writes nothing more,
//!   says so ([`Contested`]), and claims again after a while. Else it goes on as flannel does, on condition
//!   that the revision is still that of its claim, so that an answer that is late counts too.
//!
//! Answers are told from claims by their two writes, so that they can't alternate: a holder that sees one, since it took
//! the lease while the other was stopped or cut off, claims, and whoever is answered gives way. Every write is on condition
//! of the revision before, so of two that answer at once one succeeds and the other sees it, and of two that claim at once
//! the later wins: its claim is what the earlier takes for an answer. A holder that finds another MAC in its lease is a
//! claimant too. A host that has its device still (a restart, an upgrade, a takeover from flannel's daemon) finds its own
//! MAC and asks nobody. flannel's daemon does not answer; towards it a host does what flannel would.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use tokio::time::sleep;
use tracing::{info, warn};

use super::{Etcd, EtcdError, Read, Stored, Table};
use crate::{
    config::NetworkConfig,
    lease::{LeaseKey, MacAddress, allocate, is_allocatable},
    registry::{Contested, Entry, Grant, LeaseRequest, OwnLease, OwnLeaseState},
};

/// For how long an answer to a claim is waited for, ...
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// ... and how often it is looked for.
const ANSWER_LOOKS: u32 = 10;
/// An answer is more than the one write of a claim.
const ANSWER_WRITES: usize = 2;
/// How often an acquisition that lost a race begins again before it is given back to the caller's back-off.
const ACQUIRE_TRIES: usize = 10;

impl Etcd {
    /// Takes a lease: this host's own, else the subnet it had before, else a free one, as flannel does.
    ///
    /// # Errors
    /// [`EtcdError::OutOfSubnets`], [`EtcdError::LostRaces`] or [`EtcdError::Call`].
    pub async fn acquire(&mut self, config: &NetworkConfig, request: &LeaseRequest) -> Result<OwnLease, EtcdError> {
        for _ in 0..ACQUIRE_TRIES {
            if let Some(lease) = self.try_acquire(config, request).await? {
                return Ok(lease);
            }
        }
        Err(EtcdError::LostRaces)
    }

    /// Keeps the lease for another term if it is still this host's, and says how it stands with it. Claims of others are
    /// answered.
    ///
    /// # Errors
    /// [`EtcdError::Call`].
    pub async fn renew(&mut self, lease: &mut OwnLease, request: &LeaseRequest) -> Result<OwnLeaseState, EtcdError> {
        let key = self.lease_key(&lease.key);
        let response = self.client().await?.get(key.as_str(), None).await;
        let response = response.map_err(|error| self.failed("read the own lease", &error))?;
        let Some(kv) = response.kvs().first() else {
            // Whose etcd lease still runs, or never did, has had the key deleted by hand. But a store without a config
            // has lost more than that.
            let is_alive = self.keep_alive(lease.grant.etcd_lease()).await?;
            let has_config = !matches!(self.network_config().await, Err(EtcdError::NoConfig(_)));
            return Ok(if is_alive && has_config { OwnLeaseState::Deleted } else { OwnLeaseState::Expired });
        };
        let value = self.value(request, lease.vtep_mac);
        let entry = match self.read(kv) {
            Read::Lease(entry) => entry,
            // Somebody damaged it. It goes with our etcd lease still, so it is ours to mend.
            _ if kv.lease() == lease.grant.etcd_lease() => {
                let conditions = [
                    Compare::mod_revision(kv.key(), CompareOp::Equal, kv.mod_revision()),
                    Compare::lease(kv.key(), CompareOp::Equal, lease.grant.etcd_lease()),
                ];
                warn!("somebody overwrote our lease of {} with what is none; it is written again", lease.key.subnet);
                if self.put_if(&conditions, key, value, lease.grant.etcd_lease()).await?.is_some() {
                    lease.version = kv.version() + 1;
                }
                return Ok(if self.keep_alive(lease.grant.etcd_lease()).await? {
                    OwnLeaseState::Held
                } else {
                    OwnLeaseState::Expired
                });
            }
            _ => return Ok(OwnLeaseState::Expired),
        };
        if entry.attributes.public_ip != request.public_ip {
            return Ok(OwnLeaseState::Taken(entry.attributes.public_ip));
        }
        match request.backend.announced_mac(&entry.attributes) {
            Some(mac) if mac == lease.vtep_mac => {}
            Some(mac) => return Ok(OwnLeaseState::Contested(mac)),
            None => return Ok(OwnLeaseState::Expired),
        }
        if entry.etcd_lease != lease.grant.etcd_lease() || entry.value != value.as_bytes() {
            // Ours, but written anew: to be adopted like any that a start finds.
            let request = LeaseRequest { vtep_mac: Some(lease.vtep_mac), ..request.clone() };
            let Some(adopted) = self.adopt(&request, &entry).await? else { return Ok(OwnLeaseState::Expired) };
            *lease = adopted;
            return Ok(OwnLeaseState::Held);
        }
        if !self.keep_alive(lease.grant.etcd_lease()).await? {
            return Ok(OwnLeaseState::Expired);
        }
        match entry.version - lease.version {
            1 if lease.version != 0 => self.answer(lease, &entry).await.map(|()| OwnLeaseState::Claimed),
            2.. if lease.version != 0 => match self.claim(request, &entry, lease.vtep_mac).await {
                Ok(Some(_)) => {
                    lease.version = entry.version + 1;
                    Ok(OwnLeaseState::Held)
                }
                Ok(None) => Ok(OwnLeaseState::Expired),
                Err(EtcdError::Contested(Contested { vtep_mac, .. })) => Ok(OwnLeaseState::Contested(vtep_mac)),
                Err(error) => Err(error),
            },
            // Less than it was: the store went back.
            _ => {
                lease.version = entry.version;
                Ok(OwnLeaseState::Held)
            }
        }
    }

    /// Tells whoever claimed the lease that a living host has it.
    async fn answer(&mut self, lease: &mut OwnLease, claim: &Stored) -> Result<(), EtcdError> {
        let key = self.lease_key(&lease.key);
        let (mut revision, mut version) = (claim.mod_revision, claim.version);
        for _ in 0..ANSWER_WRITES {
            let unchanged = [Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)];
            let written = self.put_if(&unchanged, key.clone(), claim.value.clone(), lease.grant.etcd_lease()).await?;
            // Where somebody else wrote meanwhile, the watch tells of it.
            let Some(written) = written else { break };
            (revision, version) = (written, version + 1);
        }
        lease.version = version;
        Ok(())
    }

    /// Has the lease name another address of this host. `false` where it is not as this host wrote it, and left so.
    ///
    /// # Errors
    /// [`EtcdError::Call`].
    pub async fn announce(
        &mut self,
        lease: &mut OwnLease,
        request: &LeaseRequest,
        public_ip: Ipv4Addr,
    ) -> Result<bool, EtcdError> {
        let key = self.lease_key(&lease.key);
        let before = self.value(request, lease.vtep_mac);
        let unchanged = [
            Compare::value(key.as_str(), CompareOp::Equal, before),
            Compare::lease(key.as_str(), CompareOp::Equal, lease.grant.etcd_lease()),
        ];
        let request = LeaseRequest { public_ip, ..request.clone() };
        let value = self.value(&request, lease.vtep_mac);
        let written = self.put_if(&unchanged, key, value, lease.grant.etcd_lease()).await?;
        lease.version += i64::from(written.is_some());
        Ok(written.is_some())
    }

    /// Keeps an etcd lease for another term. `false` where etcd no longer has it.
    async fn keep_alive(&mut self, etcd_lease: i64) -> Result<bool, EtcdError> {
        if etcd_lease == 0 {
            return Ok(true);
        }
        match self.client().await?.lease_keep_alive(etcd_lease).await {
            Ok(_) => Ok(true),
            // The client's words for a response with a TTL of zero.
            Err(etcd_client::Error::LeaseKeepAliveError(message)) if message == "lease not found" => Ok(false),
            Err(error) => Err(self.failed("renew the lease", &error)),
        }
    }

    /// One attempt. [`None`] where somebody else changed the table meanwhile.
    async fn try_acquire(
        &mut self,
        config: &NetworkConfig,
        request: &LeaseRequest,
    ) -> Result<Option<OwnLease>, EtcdError> {
        let Table { leases: entries, passed_over, .. } = self.table().await?;
        let mut given_up = None;
        let mut named: Vec<_> =
            entries.iter().filter(|entry| entry.attributes.public_ip == request.public_ip).collect();
        // Where another host has the address too, there may be a lease of each.
        named.sort_by_key(|entry| {
            request.vtep_mac.is_none() || request.backend.announced_mac(&entry.attributes) != request.vtep_mac
        });
        for own in named {
            if is_allocatable(config, own.key.subnet) && own.key.ipv6_subnet.is_none() {
                return self.adopt(request, own).await;
            }
            if own.etcd_lease == 0 {
                warn!("the reservation {} for this host does not fit the network config and is not used", own.key);
                continue;
            }
            if self.confirm(request, own).await?.is_none() {
                return Ok(None);
            }
            info!("our lease of {} does not fit the network config any more and is given up", own.key.subnet);
            self.delete(own).await?;
            given_up = Some(own.key);
        }
        // A key whose value is no lease can't be made a second time either.
        let unusable = passed_over.iter().filter_map(|passed_over| passed_over.key);
        let keys = || entries.iter().map(|entry| entry.key).chain(unusable.clone());
        let taken = || keys().filter(|key| given_up != Some(*key)).map(|key| key.subnet);
        let is_free = |subnet: &ipnet::Ipv4Net| !taken().any(|lease| lease.contains(subnet) || subnet.contains(&lease));
        let previous = request.previous.filter(|subnet| is_allocatable(config, *subnet)).filter(is_free);
        let avoided = || taken().chain(request.avoid.iter().copied());
        let subnet = previous
            .or_else(|| allocate(config, avoided(), &mut rand::rng()))
            .or_else(|| allocate(config, taken(), &mut rand::rng()))
            .ok_or(EtcdError::OutOfSubnets(config.network))?;
        self.create(request, subnet.into()).await
    }

    /// Goes on with a lease that is this host's already.
    async fn adopt(&mut self, request: &LeaseRequest, own: &Stored) -> Result<Option<OwnLease>, EtcdError> {
        // A device that is gone (a reboot) is made again with the MAC that the peers know.
        let announced = request.backend.announced_mac(&own.attributes);
        let vtep_mac = request.vtep_mac.or(announced).unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let value = self.value(request, vtep_mac);
        if !self.keep_alive(own.etcd_lease).await? {
            return Ok(None);
        }
        let Some(revision) = self.confirm(request, own).await? else { return Ok(None) };
        let version = own.version + i64::from(revision != own.mod_revision);
        // A reservation stays one. A lease of another term is exchanged for one of ours.
        let has_term = own.etcd_lease == 0 || self.granted(own.etcd_lease).await? == request.ttl;
        if has_term && own.value == value.as_bytes() {
            return Ok(Some(OwnLease { key: own.key, vtep_mac, grant: Grant::EtcdLease(own.etcd_lease), version }));
        }
        let etcd_lease = if has_term { own.etcd_lease } else { self.grant(request.ttl).await? };
        let key = self.lease_key(&own.key);
        let unchanged = [
            Compare::mod_revision(key.as_str(), CompareOp::Equal, revision),
            Compare::lease(key.as_str(), CompareOp::Equal, own.etcd_lease),
        ];
        let written = self.put_if(&unchanged, key, value, etcd_lease).await?;
        Ok(written.map(|_| OwnLease {
            key: own.key,
            vtep_mac,
            grant: Grant::EtcdLease(etcd_lease),
            version: version + 1,
        }))
    }

    /// Makes sure that a lease which names this host's address is not held by another. The revision that it has then,
    /// [`None`] where it is gone or another's by now.
    async fn confirm(&mut self, request: &LeaseRequest, own: &Stored) -> Result<Option<i64>, EtcdError> {
        match request.backend.announced_mac(&own.attributes) {
            Some(mac) if request.is_contested || request.vtep_mac != Some(mac) => self.claim(request, own, mac).await,
            // No vxlan host wrote it, or this one did.
            _ => Ok(Some(own.mod_revision)),
        }
    }

    /// Asks whether a living host holds the lease that names this host's address. The claim's revision where nobody
    /// answered, [`None`] where the lease is gone or another's by now.
    async fn claim(
        &mut self,
        request: &LeaseRequest,
        own: &Stored,
        announced: MacAddress,
    ) -> Result<Option<i64>, EtcdError> {
        let (subnet, public_ip) = (own.key.subnet, request.public_ip);
        info!("the lease of {subnet} names {public_ip} with another MAC, {announced}: asking whether that host lives");
        let key = self.lease_key(&own.key);
        let unchanged = [Compare::mod_revision(key.as_str(), CompareOp::Equal, own.mod_revision)];
        let claim = self.put_if(&unchanged, key.clone(), own.value.clone(), own.etcd_lease).await?;
        let Some(claim) = claim else { return Ok(None) };
        for _ in 0..ANSWER_LOOKS {
            sleep(ANSWER_TIME / ANSWER_LOOKS).await;
            let found = self.client().await?.get(key.as_str(), None).await;
            let found = found.map_err(|error| self.failed("look for an answer", &error))?;
            let Some(kv) = found.kvs().first() else { return Ok(None) };
            if kv.mod_revision() == claim {
                continue;
            }
            return match self.read(kv) {
                Read::Lease(entry) if entry.attributes.public_ip == public_ip => {
                    let vtep_mac = request.backend.announced_mac(&entry.attributes).unwrap_or(announced);
                    Err(Contested { public_ip, subnet, vtep_mac }.into())
                }
                _ => Ok(None),
            };
        }
        info!("nobody answered: the lease of {subnet} is this host's");
        Ok(Some(claim))
    }

    async fn create(&mut self, request: &LeaseRequest, key: LeaseKey) -> Result<Option<OwnLease>, EtcdError> {
        let vtep_mac = request.vtep_mac.unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let etcd_lease = self.grant(request.ttl).await?;
        let name = self.lease_key(&key);
        let absent = [Compare::version(name.as_str(), CompareOp::Equal, 0)];
        if self.put_if(&absent, name, self.value(request, vtep_mac), etcd_lease).await?.is_some() {
            return Ok(Some(OwnLease { key, vtep_mac, grant: Grant::EtcdLease(etcd_lease), version: 1 }));
        }
        // Nothing hangs on it: it ends by itself.
        if let Err(error) = self.client().await?.lease_revoke(etcd_lease).await {
            warn!("an etcd lease that was not needed stays until it expires: {error}");
        }
        Ok(None)
    }

    fn value(&self, request: &LeaseRequest, vtep_mac: MacAddress) -> String {
        request.backend.of_host(request.public_ip, vtep_mac).to_json()
    }

    async fn grant(&mut self, ttl: Duration) -> Result<i64, EtcdError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let granted = self.client().await?.lease_grant(seconds, None).await;
        Ok(granted.map_err(|error| self.failed("grant an etcd lease", &error))?.id())
    }

    /// In how long a lease ends; [`None`] for a reservation.
    ///
    /// # Errors
    /// [`EtcdError::Call`].
    pub async fn remaining(&mut self, entry: &Entry) -> Result<Option<Duration>, EtcdError> {
        let etcd_lease = entry.grant.etcd_lease();
        if etcd_lease == 0 {
            return Ok(None);
        }
        let answer = self.client().await?.lease_time_to_live(etcd_lease, None).await;
        let answer = answer.map_err(|error| self.failed("read how long the lease lasts", &error))?;
        // Below 0 it is over.
        Ok(Some(Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0))))
    }

    /// The key of a lease.
    pub fn key_of(&self, entry: &Entry) -> String {
        self.prefix.key(&format!("subnets/{}", entry.key))
    }

    /// The term of an etcd lease.
    async fn granted(&mut self, etcd_lease: i64) -> Result<Duration, EtcdError> {
        let answer = self.client().await?.lease_time_to_live(etcd_lease, None).await;
        let answer = answer.map_err(|error| self.failed("read the lease's term", &error))?;
        Ok(Duration::from_secs(u64::try_from(answer.granted_ttl()).unwrap_or(0)))
    }

    /// Writes where the conditions hold, and says in which revision.
    async fn put_if(
        &mut self,
        conditions: &[Compare],
        key: String,
        value: impl Into<Vec<u8>>,
        etcd_lease: i64,
    ) -> Result<Option<i64>, EtcdError> {
        let options = (etcd_lease != 0).then(|| PutOptions::new().with_lease(etcd_lease));
        let txn = Txn::new().when(conditions).and_then([TxnOp::put(key, value, options)]);
        let response = self.client().await?.txn(txn).await;
        let response = response.map_err(|error| self.failed("write the lease", &error))?;
        let revision = response.header().map_or(0, |header| header.revision());
        Ok(response.succeeded().then_some(revision))
    }

    async fn delete(&mut self, entry: &Stored) -> Result<(), EtcdError> {
        let key = self.lease_key(&entry.key);
        let unchanged = Compare::create_revision(key.as_str(), CompareOp::Equal, entry.create_revision);
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let response = self.client().await?.txn(txn).await;
        response.map(drop).map_err(|error| self.failed("give up a lease", &error))
    }
}
