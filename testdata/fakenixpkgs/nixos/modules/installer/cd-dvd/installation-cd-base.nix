{
  imports = [ ./iso-image.nix ];
  isoImage.edition = "installer";
}
