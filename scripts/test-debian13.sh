#!/usr/bin/env bash
# Runs README's two commands on a fresh clone in Debian 13 (GCC 14, Python 3.13, newer Highway, Eigen,
# nlohmann/json, CLI11, SIMDe and googletest), in a folder. Needs root and the Debian package debootstrap.
#
#   scripts/test-debian13.sh [ARGUMENT...]     arguments for scripts/test.sh; without any: --quick --no-torch
#
# HQQ_DEBIAN13 is the folder, build/debian13 if it is not set; it is kept, so that the next run is quick.
# What is committed is tested, and what is not is left out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
system=${HQQ_DEBIAN13:-$root/build/debian13}
arguments=("$@")
# For Python 3.13 the pinned torch comes with gigabytes of CUDA.
if [ $# -eq 0 ]; then arguments=(--quick --no-torch); fi

skip() {
  echo "skipped: $*"
  exit 0
}
[ "$(id -u)" -eq 0 ] || skip "a Debian 13 folder needs root (debootstrap, chroot)"
command -v debootstrap >/dev/null || skip "no debootstrap (Debian package debootstrap)"

# A warning is an error here.
inside() {
  chroot "$system" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    CXXFLAGS=-Werror "$@"
}
mounted=()
unmount_all() {
  local folder
  for folder in "${mounted[@]}"; do umount --lazy "$folder"; done
}
mount_once() {
  local folder=$system/$1
  shift
  if mountpoint -q "$folder"; then return; fi
  mount "$@" "$folder"
  mounted+=("$folder")
}

if [ ! -e "$system/etc/debian_version" ] || [ -e "$system/debootstrap" ]; then
  step "Debian 13 in $system"
  # The archive that this machine uses itself.
  mirror=$(apt-get indextargets --format '$(SITE)' 'Origin: Debian' 2>/dev/null | head -n 1)
  debootstrap --variant=minbase --include=ca-certificates,g++,git,python3,python3-dev,python3-venv \
    trixie "$system" ${mirror:+"$mirror"}
  # Where packages come through a proxy with a certificate of its own.
  cp /etc/ssl/certs/ca-certificates.crt "$system/etc/ssl/certs/"
  if [ -e /etc/pip.conf ]; then cp /etc/pip.conf "$system/etc/"; fi
fi
trap unmount_all EXIT
mount_once proc -t proc proc
mount_once dev --bind /dev
cp /etc/resolv.conf "$system/etc/resolv.conf"
inside apt-get update -q

step "A fresh clone"
clone=/root/hqq.cpp
rm -rf "${system:?}$clone"
git clone -q --no-hardlinks "$root" "$system$clone"

inside "$clone/scripts/quickstart.sh"
inside "$clone/scripts/test.sh" "${arguments[@]}"
