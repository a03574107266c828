{{/* One Valkey server with an append-only file on a volume. Takes (dict "root" $ "component" ... "name" ... "secret" ... "key" ...
     "memoryMi" ... "cpu" ... "persistent" bool "size" ... "storageClass" ... "fsync" ... "bulkMb" ...
     "extra" ... "place" ...). */}}
{{- define "flawstream.valkey" -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ .name }}
  labels: {{- include "flawstream.labels" . | nindent 4 }}
data:
  valkey.conf: |
    bind * -::*
    port 6379
    protected-mode yes
    dir /data
    # required by docs/guarantees.md: every write is in the file, and nothing is evicted when memory is full
    appendonly yes
    appendfsync {{ .fsync }}
    save ""
    maxmemory {{ div (mul (int64 .memoryMi) 7) 10 }}mb
    maxmemory-policy noeviction
    maxmemory-clients 10%
    proto-max-bulk-len {{ .bulkMb }}mb
    {{- with .extra }}
    {{- . | nindent 4 }}
    {{- end }}
  # The server reads the password from a file in memory, not from its arguments, which `ps` shows.
  start.sh: |
    set -eu
    umask 077
    cat /run/secrets/valkey/password > /run/valkey/password
    cat /etc/valkey/valkey.conf > /run/valkey/valkey.conf
    printf 'requirepass "%s"\n' "$(sed 's/["\\]/\\&/g' /run/valkey/password)" >> /run/valkey/valkey.conf
    exec valkey-server /run/valkey/valkey.conf
  # A server that accepts connections is alive: one that is loading a large file must not be killed. One that started with another
  # password than its Secret has now is restarted; flawstream's pods read the new one by themselves.
  alive.sh: |
    exec 3<>/dev/tcp/127.0.0.1/6379
    [ "$(</run/valkey/password)" = "$(</run/secrets/valkey/password)" ]
  # PING like a client, with bash only. A server that is still loading its file answers LOADING, and is not ready.
  ready.sh: |
    exec 3<>/dev/tcp/127.0.0.1/6379
    password=$(</run/secrets/valkey/password)
    LC_ALL=C
    printf '*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n*1\r\n$4\r\nPING\r\n' "${#password}" "$password" >&3
    IFS= read -r -t 3 answer <&3 && [ "${answer%$'\r'}" = +OK ]
    IFS= read -r -t 3 answer <&3 && [ "${answer%$'\r'}" = +PONG ]
---
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  labels: {{- include "flawstream.labels" . | nindent 4 }}
spec:
  selector: {{- include "flawstream.selector" . | nindent 4 }}
  ports:
    - {name: redis, port: 6379, targetPort: redis}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ .name }}
  labels: {{- include "flawstream.labels" . | nindent 4 }}
spec:
  serviceName: {{ .name }}
  replicas: 1
  selector:
    matchLabels: {{- include "flawstream.selector" . | nindent 6 }}
  {{- if .persistent }}
  volumeClaimTemplates:
    - metadata:
        name: data
        labels: {{- include "flawstream.selector" . | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .size }}}}
  {{- end }}
  template:
    metadata:
      labels: {{- include "flawstream.podLabels" . | nindent 8 }}
      annotations:
        checksum/config: {{ printf "%v%v%v%v" .fsync .memoryMi .bulkMb .extra | sha256sum }}
        {{- with include "flawstream.podAnnotations" . }}
        {{- . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "flawstream.podStart" . | nindent 6 }}
      serviceAccountName: {{ include "flawstream.serviceAccount" .root }}
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 120
      containers:
        - name: valkey
          image: {{ include "flawstream.valkeyImage" .root }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          command: [bash, /etc/valkey/start.sh]
          securityContext: {{- include "flawstream.containerSecurity" .root | nindent 12 }}
          ports:
            - {name: redis, containerPort: 6379}
          livenessProbe:
            exec: {command: [bash, -e, /etc/valkey/alive.sh]}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            exec: {command: [bash, -e, /etc/valkey/ready.sh]}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 3
          resources:
            requests: {cpu: {{ .cpu | quote }}, memory: {{ int64 .memoryMi }}Mi}
            limits: {memory: {{ int64 .memoryMi }}Mi}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: config, mountPath: /etc/valkey, readOnly: true}
            - {name: password, mountPath: /run/secrets/valkey, readOnly: true}
            - {name: run, mountPath: /run/valkey}
            {{- with include "flawstream.extra" (list . "volumeMounts") }}
            {{- . | nindent 12 }}
            {{- end }}
        {{- with include "flawstream.extra" (list . "sidecars") }}
        {{- . | nindent 8 }}
        {{- end }}
      volumes:
        - name: config
          configMap: {name: {{ .name }}}
        - name: password
          secret: {secretName: {{ .secret }}, defaultMode: 0440, items: [{key: {{ .key }}, path: password}]}
        - name: run
          emptyDir: {medium: Memory, sizeLimit: 1Mi}
        {{- with include "flawstream.extra" (list . "volumes") }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if not .persistent }}
        - name: data
          emptyDir: {}
        {{- end }}
{{- end -}}
