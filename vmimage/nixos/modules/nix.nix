# Nix: jobs use it through its daemon, as users that it does not trust.
{ config, lib, ... }:
{
  nix = {
    channel.enable = false; # jobs name their nixpkgs
    settings = {
      allowed-users = [
        "root"
        "builder"
        "@jobs"
      ];
      experimental-features = [
        "nix-command"
        "flakes"
      ];
      sandbox = true;
      max-jobs = "auto";
      cores = 0;
      # Without a network, a job should not wait long to learn it; without the cache, what can be built is.
      connect-timeout = 10;
      download-attempts = 3;
      fallback = true;
      log-lines = 50;
      warn-dirty = false;
      # A flake's own settings would ask for an answer.
      accept-flake-config = false;
    };
    # Limits of the garbage collection, there once the store is on the disk: in memory, collecting would take the running
    # system away. And the settings of the site.
    extraOptions = ''
      !include /run/osbuilder/gc.conf
      !include /run/osbuilder/nix.conf
    '';
  };

  systemd.services.nix-daemon = {
    # Builds run in this unit. They leave room for the runner and the jobs, and one that is killed for its memory does not
    # take the daemon with it.
    serviceConfig = {
      MemoryMax = "85%";
      OOMPolicy = "continue";
      KillMode = "mixed";
    };
    # Later versions build there by themselves. /tmp is memory.
    environment = lib.mkIf (lib.versionOlder (lib.getVersion config.nix.package) "2.30") {
      TMPDIR = "/nix/var/nix/builds";
    };
  };
  systemd.tmpfiles.rules = [ "d /nix/var/nix/builds 0755 root root 7d -" ];
}
