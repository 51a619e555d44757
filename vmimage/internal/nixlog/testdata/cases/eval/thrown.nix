{ lib, ... }:
{
  networking.hostName =
    if lib.versionAtLeast lib.version "20" then throw "this host needs a key" else "host";
}
