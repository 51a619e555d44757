# The VM's half of the pipe.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  folder = ../programs;
  # Built before, so that neither Go nor its modules are needed in here.
  program =
    name:
    let
      file = folder + "/${name}";
    in
    if builtins.pathExists file then
      "install -D -m 0755 ${file} $out/bin/${name}"
    else
      throw "${toString file} is missing: run scripts/programs.sh, which builds the VM's own programs";
  programs = pkgs.runCommand "osbuilder-programs" { preferLocalBuild = true; } (
    lib.concatMapStringsSep "\n" program [
      "pipe-runner"
      "image-build"
    ]
  );
in
{
  environment.systemPackages = [ programs ];

  systemd.services.pipe-runner = {
    description = "Runs what is written to pipe_in";
    wantedBy = [ "multi-user.target" ];
    requires = [ "osbuilder-config.service" ];
    wants = [ "osbuilder-systems.service" ];
    after = [
      "osbuilder-config.service"
      "osbuilder-store.service"
      "osbuilder-systems.service"
      "nix-daemon.socket"
    ];
    unitConfig.StartLimitIntervalSec = 0;
    path = [
      config.systemd.package
      pkgs.bash
    ];
    serviceConfig = {
      EnvironmentFile = "/run/osbuilder/runner.env";
      ExecStart = "${programs}/bin/pipe-runner run --pipe /nexus_bootstrap --data /data --slots \${SLOTS} --image \${IMAGE}";
      Restart = "always";
      RestartSec = 1;
      OOMScoreAdjust = -900;
    };
  };
}
