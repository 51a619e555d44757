{
  imports = [ ./conflicting.nix ];
  networking.hostName = "one";
}
