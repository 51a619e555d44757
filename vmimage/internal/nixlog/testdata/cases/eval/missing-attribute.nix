let
  pkgs = { htop = 1; };
in
{
  packages = [ pkgs.htopp ];
}
