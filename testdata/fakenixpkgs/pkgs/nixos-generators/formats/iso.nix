{ modulesPath, ... }:
{
  imports = [ "${toString modulesPath}/installer/cd-dvd/iso-image.nix" ];
  formatAttr = "isoImage";
  fileExtension = ".iso";
}
