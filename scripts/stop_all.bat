@echo off
rem Stops what start_windows.bat has started, and nothing else:
rem     scripts\stop_all.bat [CONFIG.json] [IDS]
rem Without CONFIG.json: what runs of two_hosts_config.json.
setlocal
set "scripts=%~dp0"

set "config="
if /i "%~x1"==".json" set "config=%~1"
if defined config (shift) else set "config=%scripts%..\two_hosts_config.json"
set "ids="
:next
if "%~1"=="" goto find
set "ids=%ids% %1"
shift
goto next

:find
set "python=py -3"
py -3 -c "pass" >nul 2>&1
if not errorlevel 1 goto start
set "python=python"
python -c "pass" >nul 2>&1
if not errorlevel 1 goto start
echo Python 3.10 or later is needed and was not found; install it from python.org 1>&2
exit /b 2

:start
%python% "%scripts%run.py" stop "%config%"%ids%
exit /b %errorlevel%
