#!/bin/sh
# Becomes systemd, process 1 of namespaces of its own: the root file system over this machine's, where what is written goes into
# memory, and a hierarchy of services that has nothing of this machine's in it. The argument is an empty folder.
set -e
top=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
root=$top/root
mount -t proc proc "$root/proc"
# Settings that are not a network namespace's stay as they are.
for folder in fs kernel vm; do
    mount --bind "$root/proc/sys/$folder" "$root/proc/sys/$folder"
    mount -o remount,bind,ro "$root/proc/sys/$folder"
done
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t bpf bpf "$root/sys/fs/bpf"
units=usr/lib/systemd/system
mount -t tmpfs tmpfs "$root/etc/systemd/system"
mount -t tmpfs tmpfs "$root/usr/lib/systemd/system-generators"
mount -t tmpfs tmpfs "$root/$units"
for unit in sysinit.target basic.target multi-user.target sockets.target shutdown.target network-online.target network.target \
    systemd-journald.service systemd-journald.socket; do
    cp "/$units/$unit" "$root/$units/"
done
mkdir "$root/$units/sockets.target.wants"
ln -s ../systemd-journald.socket "$root/$units/sockets.target.wants/"
for folder in run tmp dev; do
    mount -t tmpfs tmpfs "$root/$folder"
done
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/net" "$root/dev/shm" "$root/dev/pts"
touch "$root/dev/net/tun"
mount --bind /dev/net/tun "$root/dev/net/tun"
ln -s /proc/self/fd "$root/dev/fd"
# Images of containers forbid packages to start anything.
rm -f "$root/usr/sbin/policy-rc.d"
exec chroot "$root" env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no
