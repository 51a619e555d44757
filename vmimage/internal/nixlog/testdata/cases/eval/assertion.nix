{
  assertions = [
    {
      assertion = false;
      message = "this host must have a name";
    }
  ];
  fileSystems."/".device = "/dev/sda1";
  boot.loader.grub.device = "nodev";
}
