# The medium: one ISO that boots by BIOS and by UEFI, as a CD and as a USB disk.
# From the bare iso-image.nix: the installers bring a channel, all firmware and a user who logs in by himself.
{
  config,
  lib,
  modulesPath,
  ...
}:
{
  imports = [
    (modulesPath + "/installer/cd-dvd/iso-image.nix")
    (modulesPath + "/profiles/qemu-guest.nix")
  ];

  isoImage = {
    makeEfiBootable = true;
    # A hybrid image, which qemux/qemu attaches as a USB disk.
    makeUsbBootable = true;
    edition = "osbuilder"; # part of the volume's label, of 32 characters at most
    appendToMenuLabel = " builder VM";
    # Quicker to make and to read than the default, a tenth larger.
    squashfsCompression = "zstd -Xcompression-level 6";
    # No display need be there.
    forceTextMode = true;
    # This text lands in isolinux.cfg: no menu to wait in, no editing of the kernel's command line. The timeout is in
    # tenths of a second.
    syslinuxTheme = ''
      TIMEOUT 1
      ALLOWOPTIONS 0
      NOESCAPE 1
      MENU HIDDEN
      MENU NOTABMSG
    '';
  };
  # To GRUB 0 is "at once, without a menu"; to isolinux "wait for ever", which is why it has its own above.
  boot.loader.timeout = lib.mkForce 0;

  # The ISO module knows stage 1 with systemd from 26.05 on, where the scripted one is on its way out.
  boot.initrd.systemd.enable = lib.versionAtLeast lib.trivial.release "26.05";
  # Without KVM on a busy host udev may need minutes to come to the medium; systemd's own patience ends after 90 seconds.
  boot.kernelParams = [ "systemd.default_device_timeout_sec=600" ];
  # Whatever the ISO is attached to.
  boot.initrd.availableKernelModules = [
    "xhci_pci"
    "usb_storage"
    "uas"
    "sd_mod"
    "sr_mod"
    "ahci"
    "virtio_scsi"
    "virtio_blk"
    "nvme"
  ];

  # Nothing that it keeps was made by another release.
  system.stateVersion = lib.mkDefault config.system.nixos.release;
}
