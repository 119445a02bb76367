#!/bin/sh
# Runs a command as a runtime runs a container without privileges on the host's network: its root file system is this machine's and is not
# written to, nor is anything below /proc/sys. The arguments: an empty folder; the volumes, as FROM=TO; --; the command.
set -e
top=$1
shift
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$top/root"
root=$top/root
mkdir -p "$root/host"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs sysfs "$root/sys" -o ro
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
while [ "$1" != -- ]; do
    from=${1%%=*}
    to=$root${1#*=}
    if [ -d "$from" ]; then
        mkdir -p "$to"
    else
        mkdir -p "${to%/*}"
        : > "$to"
    fi
    mount --bind "$from" "$to"
    shift
done
shift
mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
