{{/* Name of an engine's objects: recipes' names have dots, Kubernetes' mostly not. */}}
{{- define "openlora.name" -}}
{{- printf "%s-%s" .root.Release.Name (.name | replace "." "-") | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "openlora.selector" -}}
app.kubernetes.io/name: openlora
app.kubernetes.io/instance: {{ include "openlora.name" . }}
{{- end }}

{{- define "openlora.labels" -}}
{{ include "openlora.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "openlora.modelsClaim" -}}
{{- .Values.models.claim | default (printf "%s-models" .Release.Name) -}}
{{- end }}

{{/* What all pods of an engine have in common. Needs .root .name .engine, and .volumes with the state's volume or none. */}}
{{- define "openlora.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: 60
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: models
    persistentVolumeClaim:
      claimName: {{ include "openlora.modelsClaim" .root }}
      readOnly: true
  - name: adapters
    {{- if .root.Values.adapters.claim }}
    persistentVolumeClaim:
      claimName: {{ .root.Values.adapters.claim }}
      readOnly: true
    {{- else }}
    emptyDir: {}
    {{- end }}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ .engine.sharedMemory }}
  - name: tmp
    emptyDir: {}
  {{- if gt (int .engine.nodes) 1 }}
  - name: ssh
    secret:
      secretName: {{ required "ssh.secret: engines on several nodes need keys" .root.Values.ssh.secret }}
      defaultMode: 0440
  {{- end }}
{{- end }}

{{- define "openlora.container" -}}
image: {{ printf "%s:%s" .root.Values.image.repository .root.Values.image.tag }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
workingDir: /opt/openlora
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
env:
  - name: HOME
    value: /tmp
  {{- range $name, $value := .root.Values.environment }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
resources:
  requests:
    cpu: {{ .engine.cpu | quote }}
    memory: {{ .engine.memory }}
  limits:
    memory: {{ .engine.memory }}
    nvidia.com/gpu: {{ .engine.gpus }}
{{- end }}

{{- define "openlora.mounts" -}}
- name: models
  mountPath: /models
  readOnly: true
- name: adapters
  mountPath: /adapters
  readOnly: true
- name: shared-memory
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
{{- if gt (int .engine.nodes) 1 }}
- name: ssh
  mountPath: /ssh
  readOnly: true
{{- end }}
{{- end }}

{{/* The container that serves: the only one of an engine on one node, the leader's of several. */}}
{{- define "openlora.server" -}}
name: openlora
{{ include "openlora.container" . }}
command: [/opt/openlora/venv/bin/python, build_scripts/launch_engine.py]
args:
  - {{ .engine.recipe }}
  {{- with .engine.version }}
  - --version={{ . }}
  {{- end }}
  {{- if gt (int .engine.nodes) 1 }}
  - --group
  - --ssh-port={{ .root.Values.ssh.port }}
  - --ssh-keys=/ssh
  {{- end }}
ports:
  - {name: http, containerPort: 8000}
  - {name: grpc, containerPort: 8001}
  - {name: metrics, containerPort: 8002}
  - {name: health, containerPort: 8003}
  - {name: gateway, containerPort: 9000}
# Weights are read, and graphs and caches made, before the first /readyz: an hour of it.
startupProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 360
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /livez, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
volumeMounts:
  {{- include "openlora.mounts" . | nindent 2 }}
  - name: state
    mountPath: /var/lib/openlora
{{- end }}

{{- define "openlora.annotations" -}}
{{- if .root.Values.metrics.annotations -}}
prometheus.io/scrape: "true"
prometheus.io/port: "8002"
prometheus.io/path: /metrics
{{- end }}
{{- end }}
