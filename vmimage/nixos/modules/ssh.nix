# One user, one way in: a public key that came with this boot. Never a host key that the VM made up itself.
{
  config,
  lib,
  options,
  ...
}:
let
  ssh = config.programs.ssh.package;
in
{
  services.openssh = {
    enable = true;
    startWhenNeeded = false;
    hostKeys = [ ];
    authorizedKeysFiles = lib.mkForce [ "/run/osbuilder/authorized_keys" ];
    sftpServerExecutable = "internal-sftp";
    settings = {
      AllowUsers = [ "builder" ];
      HostKey = "/run/osbuilder/ssh_host_ed25519_key";
      AuthenticationMethods = "publickey";
      PasswordAuthentication = false;
      KbdInteractiveAuthentication = false;
      PermitRootLogin = "no";
      # Without PAM no session asks logind for a slice and a user manager, which takes seconds under emulation.
      UsePAM = false;
      PermitUserRC = false;
      DisableForwarding = true;
      X11Forwarding = false;
      # Commands need no shell that reads a profile to be found. PAM would have set it.
      SetEnv = "PATH=/run/current-system/sw/bin";
      # A client that vanished is noticed after 90 s, and what it left running ends.
      ClientAliveInterval = 30;
      ClientAliveCountMax = 3;
      UseDns = false;
      PrintMotd = false;
      PrintLastLog = false;
    }
    # Behind QEMU's network all clients have one address: a stranger's bad key must not shut the door for everyone.
    // lib.optionalAttrs (lib.versionAtLeast (lib.getVersion ssh) "9.8") { PerSourcePenalties = false; };
  }
  // lib.optionalAttrs (options.services.openssh ? generateHostKeys) { generateHostKeys = false; };

  systemd.services.sshd = {
    requires = [ "osbuilder-config.service" ];
    after = [ "osbuilder-config.service" ];
    serviceConfig = {
      Restart = lib.mkForce "always";
      RestartSec = 1;
      OOMScoreAdjust = -900;
    };
  };
}
