{ pkgs, ... }:
{
  environment.systemPackages = [ pkgs.htopp ];
}
