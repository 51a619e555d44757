# shellcheck shell=bash
# Takes what the VM is told at boot from QEMU's fw_cfg.
set -uo pipefail
items=/sys/firmware/qemu_fw_cfg/by_name/opt/org.osbuilder
run=/run/osbuilder
modprobe -q qemu_fw_cfg || :

# Processes of others are invisible, for jobs as for the SSH user.
mount -o remount,hidepid=invisible /proc || echo "osbuilder: users can see each other's processes"
mkdir -p "$run"

# The image is what it was built from: Nix names the system after that.
digest=$(readlink -f /run/booted-system | sha256sum)
image=nixos-$RELEASE-${digest:0:12}
echo "$image" >"$run/image"

slots=$(cat "$items/slots/raw" 2>/dev/null) || slots=
if [[ ! $slots =~ ^[1-8]$ ]]; then
  [[ -z $slots ]] || echo "osbuilder: SLOTS=$slots is not a number from 1 to 8: taking 2"
  slots=2
fi
printf 'SLOTS=%s\nIMAGE=%s\n' "$slots" "$image" >"$run/runner.env"

# Everyone's Nix reads the site's nix.conf, so it must not hold a secret; one with a syntax error would stop every Nix.
rm -f "$run/nix.conf"
if [[ -e $items/nix.conf/raw ]]; then
  mkdir -p "$run/check"
  cat "$items/nix.conf/raw" >"$run/check/nix.conf"
  if why=$(NIX_CONF_DIR=$run/check nix-store --version 2>&1 >/dev/null); then
    mv "$run/check/nix.conf" "$run/nix.conf"
    echo "osbuilder: settings for Nix were given to the VM"
  else
    echo "osbuilder: the nix.conf that was given is left out: ${why//$'\n'/ }"
  fi
  rm -rf "$run/check"
fi

# take ITEM MODE: copies an item that must be there and not empty. (The item's file in sysfs is always of size 0: only its
# copy tells.)
take() {
  rm -f "$run/$1"
  (umask 077 && cat "$items/$1/raw" >"$run/$1") 2>/dev/null
  if [[ ! -s $run/$1 ]]; then
    echo "osbuilder: no $1 was given to the VM, so SSH stays off: start QEMU with -fw_cfg name=opt/org.osbuilder/$1,file=... (a file that is not empty)"
    return 1
  fi
  chmod "$2" "$run/$1"
}
if ! take authorized_keys 0644 || ! take ssh_host_ed25519_key 0600; then exit 1; fi
if ! key=$(ssh-keygen -l -f "$run/ssh_host_ed25519_key" 2>&1); then
  echo "osbuilder: the ssh_host_ed25519_key that was given is no private key, so SSH stays off: $key"
  exit 1
fi
read -r _ fingerprint _ <<<"$key"
echo "osbuilder: $image, SSH host key $fingerprint"
