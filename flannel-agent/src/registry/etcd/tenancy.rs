//! Taking, keeping and losing this host's own lease. Every write is a transaction on the key's being what was read, so
//! that a host which slept can't take back what another has by then.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use tracing::{info, warn};

use super::{Read, Registry, RegistryError};
use crate::{
    config::NetworkConfig,
    lease::{LeaseAttributes, LeaseKey, MacAddress, allocate, is_allocatable},
    registry::{Entry, LeaseRequest, OwnLease, Snapshot, Standing},
};

/// How often an acquisition that lost a race begins again before it is given back to the caller's back-off.
const ACQUIRE_TRIES: usize = 10;

impl Registry {
    /// Takes a lease: this host's own, else the subnet it had before, else a free one, as flannel does.
    ///
    /// # Errors
    /// [`RegistryError::OutOfSubnets`], [`RegistryError::LostRaces`] or [`RegistryError::Call`].
    pub async fn acquire(&mut self, config: &NetworkConfig, request: &LeaseRequest) -> Result<OwnLease, RegistryError> {
        for _ in 0..ACQUIRE_TRIES {
            if let Some(lease) = self.try_acquire(config, request).await? {
                return Ok(lease);
            }
        }
        Err(RegistryError::LostRaces)
    }

    /// Keeps the lease for another term if it is still this host's, and says how it stands with it.
    ///
    /// # Errors
    /// [`RegistryError::Call`].
    pub async fn standing(&mut self, lease: &OwnLease, request: &LeaseRequest) -> Result<Standing, RegistryError> {
        let response = self.client().await?.get(self.lease_key(&lease.key), None).await;
        let response = response.map_err(|error| self.failed("read the own lease", &error))?;
        let Some(kv) = response.kvs().first() else {
            // Whose etcd lease still runs, or never did, has had the key deleted by hand. But a store without a config
            // has lost more than that.
            let is_alive = self.keep_alive(lease.etcd_lease).await?;
            let has_config = !matches!(self.network_config().await, Err(RegistryError::NoConfig(_)));
            return Ok(if is_alive && has_config { Standing::Revoked } else { Standing::Expired });
        };
        let entry = match self.read(kv) {
            Read::Lease(entry) => entry,
            // Somebody damaged it. It goes with our etcd lease still, so it is ours to mend.
            _ if kv.lease() == lease.etcd_lease => {
                let conditions = [
                    Compare::mod_revision(kv.key(), CompareOp::Equal, kv.mod_revision()),
                    Compare::lease(kv.key(), CompareOp::Equal, lease.etcd_lease),
                ];
                warn!("somebody overwrote our lease of {} with what is none; it is written again", lease.key.subnet);
                let value = self.value(request, lease.vtep_mac);
                self.put_if(&conditions, self.lease_key(&lease.key), value, lease.etcd_lease).await?;
                return Ok(if self.keep_alive(lease.etcd_lease).await? { Standing::Held } else { Standing::Expired });
            }
            _ => return Ok(Standing::Expired),
        };
        if entry.attributes.public_ip != request.public_ip {
            return Ok(Standing::Taken(entry.attributes.public_ip));
        }
        // Ours by its address, but written anew: to be adopted like any that a start finds.
        let is_same =
            entry.etcd_lease == lease.etcd_lease && entry.value == self.value(request, lease.vtep_mac).as_bytes();
        Ok(if is_same && self.keep_alive(lease.etcd_lease).await? { Standing::Held } else { Standing::Expired })
    }

    /// Has the lease name another address of this host. `false` where it is not as this host wrote it, and left so.
    ///
    /// # Errors
    /// [`RegistryError::Call`].
    pub async fn announce(
        &mut self,
        lease: &OwnLease,
        request: &LeaseRequest,
        public_ip: Ipv4Addr,
    ) -> Result<bool, RegistryError> {
        let key = self.lease_key(&lease.key);
        let before = self.value(request, lease.vtep_mac);
        let unchanged = [
            Compare::value(key.as_str(), CompareOp::Equal, before),
            Compare::lease(key.as_str(), CompareOp::Equal, lease.etcd_lease),
        ];
        let request = LeaseRequest { public_ip, ..request.clone() };
        let value = self.value(&request, lease.vtep_mac);
        self.put_if(&unchanged, key, value, lease.etcd_lease).await
    }

    /// Keeps an etcd lease for another term. `false` where etcd no longer has it.
    async fn keep_alive(&mut self, etcd_lease: i64) -> Result<bool, RegistryError> {
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
    ) -> Result<Option<OwnLease>, RegistryError> {
        let Snapshot { entries, passed_over, .. } = self.snapshot().await?;
        let mut given_up = None;
        for own in entries.iter().filter(|entry| entry.attributes.public_ip == request.public_ip) {
            if is_allocatable(config, own.key.subnet) && own.key.ipv6_subnet.is_none() {
                return self.adopt(request, own).await;
            }
            if own.etcd_lease == 0 {
                warn!("the reservation {} for this host does not fit the network config and is not used", own.key);
                continue;
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
        let subnet = previous
            .or_else(|| allocate(config, taken(), &mut rand::rng()))
            .ok_or(RegistryError::OutOfSubnets(config.network))?;
        self.create(request, subnet.into()).await
    }

    /// Goes on with a lease that is this host's already.
    async fn adopt(&mut self, request: &LeaseRequest, own: &Entry) -> Result<Option<OwnLease>, RegistryError> {
        // A device that is gone (a reboot) is made again with the MAC that the peers know.
        let announced = own.attributes.vxlan_data().ok().map(|data| data.vtep_mac);
        let vtep_mac = request.vtep_mac.or(announced).unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let value = self.value(request, vtep_mac);
        if !self.keep_alive(own.etcd_lease).await? {
            return Ok(None);
        }
        // A reservation stays one. A lease of another term is exchanged for one of ours.
        let has_term = own.etcd_lease == 0 || self.granted(own.etcd_lease).await? == request.ttl;
        if has_term && own.value == value.as_bytes() {
            return Ok(Some(OwnLease { key: own.key, vtep_mac, etcd_lease: own.etcd_lease }));
        }
        let etcd_lease = if has_term { own.etcd_lease } else { self.grant(request.ttl).await? };
        let key = self.lease_key(&own.key);
        let unchanged = [
            Compare::create_revision(key.as_str(), CompareOp::Equal, own.create_revision),
            Compare::lease(key.as_str(), CompareOp::Equal, own.etcd_lease),
        ];
        let written = self.put_if(&unchanged, key, value, etcd_lease).await?;
        Ok(written.then_some(OwnLease { key: own.key, vtep_mac, etcd_lease }))
    }

    async fn create(&mut self, request: &LeaseRequest, key: LeaseKey) -> Result<Option<OwnLease>, RegistryError> {
        let vtep_mac = request.vtep_mac.unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        let etcd_lease = self.grant(request.ttl).await?;
        let name = self.lease_key(&key);
        let absent = [Compare::version(name.as_str(), CompareOp::Equal, 0)];
        if self.put_if(&absent, name, self.value(request, vtep_mac), etcd_lease).await? {
            return Ok(Some(OwnLease { key, vtep_mac, etcd_lease }));
        }
        // Nothing hangs on it: it ends by itself.
        if let Err(error) = self.client().await?.lease_revoke(etcd_lease).await {
            warn!("an etcd lease that was not needed stays until it expires: {error}");
        }
        Ok(None)
    }

    fn value(&self, request: &LeaseRequest, vtep_mac: MacAddress) -> String {
        LeaseAttributes::vxlan(request.public_ip, request.vni.get(), vtep_mac).to_json()
    }

    async fn grant(&mut self, ttl: Duration) -> Result<i64, RegistryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let granted = self.client().await?.lease_grant(seconds, None).await;
        Ok(granted.map_err(|error| self.failed("grant an etcd lease", &error))?.id())
    }

    /// The term of an etcd lease.
    async fn granted(&mut self, etcd_lease: i64) -> Result<Duration, RegistryError> {
        let answer = self.client().await?.lease_time_to_live(etcd_lease, None).await;
        let answer = answer.map_err(|error| self.failed("read the lease's term", &error))?;
        Ok(Duration::from_secs(u64::try_from(answer.granted_ttl()).unwrap_or(0)))
    }

    async fn put_if(
        &mut self,
        conditions: &[Compare],
        key: String,
        value: String,
        etcd_lease: i64,
    ) -> Result<bool, RegistryError> {
        let options = (etcd_lease != 0).then(|| PutOptions::new().with_lease(etcd_lease));
        let txn = Txn::new().when(conditions).and_then([TxnOp::put(key, value, options)]);
        let response = self.client().await?.txn(txn).await;
        Ok(response.map_err(|error| self.failed("write the lease", &error))?.succeeded())
    }

    async fn delete(&mut self, entry: &Entry) -> Result<(), RegistryError> {
        let key = self.lease_key(&entry.key);
        let unchanged = Compare::create_revision(key.as_str(), CompareOp::Equal, entry.create_revision);
        let txn = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let response = self.client().await?.txn(txn).await;
        response.map(drop).map_err(|error| self.failed("give up a lease", &error))
    }
}
