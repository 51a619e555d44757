# shellcheck shell=bash
# Makes the ISO, as a Nix builder in the Debian flavour of the builder VM.
set -euo pipefail
: "${out:?}" "${toplevel:?}" "${volumeID:?}" "${baseName:?}" "${usb?}" "${timeout?}"

echo "making the initramfs"
mkdir -p root/bin root/dev root/proc root/sys
cp /usr/bin/busybox root/bin/busybox
cp -r "$toplevel" root/system
cat >root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for console in /dev/ttyS0 /dev/tty0; do
  {
    echo "FIXTURE: an image of Debian's kernel, made to test the builder"
    echo "FIXTURE host $(/bin/busybox cat /system/hostname)"
    echo "FIXTURE marker $(/bin/busybox cat /system/marker)"
  } >"$console"
done 2>/dev/null
/bin/busybox sleep 3
/bin/busybox poweroff -f
INIT
chmod -R u+w root
chmod 755 root/init
(cd root && find . | cpio --quiet -o -H newc -R 0:0) | gzip -9 >initrd.gz

echo "gathering kernel and boot loader"
mkdir -p iso/isolinux "$out/iso" "$out/nix-support"
cp /run/osbuilder/iso/live/vmlinuz iso/vmlinuz
cp initrd.gz iso/initrd.gz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso/isolinux/
cat >iso/isolinux/isolinux.cfg <<CONFIG
serial 0 115200
default fixture
prompt 0
label fixture
  kernel /vmlinuz
  append initrd=/initrd.gz console=tty0 console=ttyS0,115200 quiet no_timer_check
CONFIG

image=$out/iso/$baseName.iso
echo "writing ${image##*/}"
hybrid=()
[ -z "$usb" ] || hybrid=(-isohybrid-mbr /usr/lib/ISOLINUX/isohdpfx.bin)
xorriso -as mkisofs -quiet -V "$volumeID" -R \
  -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
  "${hybrid[@]}" -o "$image" iso 2>xorriso.log || {
  cat xorriso.log >&2
  exit 1
}
echo "file iso $image" >"$out/nix-support/hydra-build-products"
